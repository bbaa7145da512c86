"""Tasks of lm-evaluation-harness on data from local files. Needs the extra `eval`.

The harness's own definitions are used unchanged: prompts, choices, metrics. Only where their rows
come from differs, and rows of another published form are brought into the form of the definition.

BoolQ: the harness reads SuperGLUE's copy, whose passages begin with the article's title and " -- ";
the original release has no titles. Numbers on one are not numbers on the other.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatom.errors import CalibrationError
from quatom.evaluation.passkey import LENGTHS, passkey_rows, passkey_task

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """Where the rows of a task lie in a data folder, and how they become the harness's."""

    definition: str
    """Folder of the definition inside the harness's tasks."""
    split: str
    """Split that the harness evaluates on."""
    files: tuple[str, ...]
    """Names of the JSON-lines file, inside a folder called like the task."""
    convert: Callable[[Row], Row]
    """One row in the form of the definition; raises KeyError on a missing field."""
    shots: tuple[str, ...] = ()
    """The same of the rows that solved examples in front of each question are drawn from."""


def _fields(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


def _arc(row: Row) -> Row:
    if "gold" in row:
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        return {"question": row["question"], "choices": choices, "answerKey": labels[row["gold"]]}
    return _fields("question", "choices", "answerKey")(row)


def _boolq(row: Row) -> Row:
    label = row["label"] if "label" in row else int(row["answer"])
    return {"question": row["question"], "passage": row["passage"], "label": label}


TASKS: dict[str, LocalTask] = {
    "piqa": LocalTask(
        "piqa", "validation", ("validation.jsonl",), _fields("goal", "sol1", "sol2", "label")
    ),
    "arc_easy": LocalTask("arc", "test", ("test.jsonl",), _arc),
    "arc_challenge": LocalTask("arc", "test", ("test.jsonl",), _arc),
    "boolq": LocalTask("super_glue/boolq", "validation", ("validation.jsonl",), _boolq),
    "hellaswag": LocalTask(
        "hellaswag",
        "validation",
        ("validation.jsonl",),
        _fields("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": LocalTask(
        "winogrande",
        "validation",
        ("validation.jsonl", "xl_validation.jsonl"),
        _fields("sentence", "option1", "option2", "answer"),
    ),
    "lambada_openai": LocalTask("lambada", "test", ("test.jsonl",), _fields("text")),
    "gsm8k": LocalTask(
        "gsm8k",
        "test",
        ("test.jsonl",),
        _fields("question", "answer"),
        ("train.jsonl", "train_first1000.jsonl"),
    ),
}
"""Tasks that run from local files, under the harness's names."""

_SHOTS = "train"
"""Split of solved examples."""


def find_data(task: str, data_dir: Path) -> dict[str, Path]:
    """The files with a task's rows, by split.

    Raises:
        CalibrationError: the task has no local form, or a file is not there.
    """
    if task not in TASKS:
        raise CalibrationError(
            f"task {task!r} cannot run from local files; those that can are {', '.join(TASKS)}: "
            "leave --data-dir out to download its data"
        )
    local = TASKS[task]
    wanted = {local.split: local.files} | ({_SHOTS: local.shots} if local.shots else {})
    found = {}
    for split, names in wanted.items():
        paths = [path for name in names if (path := data_dir / task / name).is_file()]
        if not paths:
            raise CalibrationError(
                f"{data_dir / task / names[0]} does not exist: put the rows of {task}'s {split} "
                "split there, one JSON object per line, or leave --data-dir out to download them"
            )
        found[split] = paths[0]
    return found


def read_rows(task: str, path: Path) -> list[Row]:
    """The rows of a JSON-lines file in the form of the task's definition.

    Raises:
        CalibrationError: a line is not JSON or lacks a field, or there is none.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(TASKS[task].convert(json.loads(line)))
            except KeyError as error:
                raise CalibrationError(
                    f"{path}:{number} has no field {error}, which {task} needs: is this another "
                    "task's file?"
                ) from None
            except (ValueError, TypeError, IndexError) as error:
                raise CalibrationError(f"{path}:{number} is no row of {task}: {error}") from None
    if not rows:
        raise CalibrationError(f"{path} is empty: put the rows of {task} there, one per line")
    return rows


def load_tasks(names: Sequence[str], data_dir: Path | None = None) -> dict[str, Any]:
    """The harness's task objects by name, zero-shot, with their data.

    Args:
        names: task names of the harness; without `data_dir` also its groups and tags.
        data_dir: folder of local data; None downloads through `datasets`.

    Raises:
        CalibrationError: a task is unknown, or its data cannot be had.
    """
    from lm_eval import tasks as harness

    if not names:
        raise CalibrationError(
            f"no task was named; local data exists for {', '.join(TASKS)}, and none is needed for "
            f"{', '.join(LENGTHS)}"
        )
    named = [name for name in names if name not in LENGTHS]
    rows = {}
    if data_dir is not None:
        for name in named:
            found = find_data(name, data_dir)
            rows[name] = {split: read_rows(name, path) for split, path in found.items()}
    # Reading all 14,000 definitions takes 10 s, so look only where they are known to be.
    root = Path(harness.__file__).parent
    known = all(name in TASKS for name in named)
    manager = harness.TaskManager(
        include_defaults=not known,
        include_path=[root / folder for folder in sorted({TASKS[n].definition for n in named})]
        if known
        else None,
    )
    if unknown := [name for name in named if name not in manager.all_tasks]:
        raise CalibrationError(
            f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}: "
            "`lm-eval ls tasks` lists its own"
        )
    specs = named if data_dir is None else [_local_group(rows)] if rows else []
    made = [
        passkey_task(name, _source({"test": passkey_rows(name)}))
        for name in names
        if name in LENGTHS
    ]
    try:
        with quiet() if data_dir is not None or not named else nullcontext():
            tasks = manager.load([*specs, *made])["tasks"]
    except Exception as error:  # the hub's errors have no common base
        first = (str(error).splitlines() or [""])[0]
        raise CalibrationError(
            f"the data of {', '.join(names)} cannot be had: {type(error).__name__}: {first}; "
            "offline, give a folder of JSON-lines files with --data-dir"
        ) from error
    for task in tasks.values():
        # Exactly what the harness's own command line does where no --num_fewshot is given.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return tasks


def _local_group(rows: dict[str, dict[str, list[Row]]]) -> dict[str, Any]:
    """A group whose members are registered tasks with another source of rows, given by split."""
    splits = {"training_split": _SHOTS, "validation_split": "validation", "test_split": "test"}
    members = [
        {"task": name, "custom_dataset": _source(parts)}
        | {field: split if split in parts else None for field, split in splits.items()}
        for name, parts in rows.items()
    ]
    return {"group": "local", "task": members}


def _source(parts: dict[str, list[Row]]) -> Callable[..., dict[str, Any]]:
    import datasets

    return lambda **_: {split: datasets.Dataset.from_list(rows) for split, rows in parts.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's warning about any custom data source, and `datasets`' bars."""
    import datasets

    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    bars = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
