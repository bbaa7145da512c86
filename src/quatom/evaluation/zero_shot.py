"""Zero-shot accuracy through lm-evaluation-harness: its tasks, prompts and metrics, our model.

Source: lm-evaluation-harness (Gao et al., 2024).
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from quatom.arguments import Range, checked
from quatom.errors import CalibrationError
from quatom.evaluation.standard_error import of_accuracy
from quatom.loading import LoadedModel

DEFAULT_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
"""The tasks of Atom's table."""


def find_harness() -> None:
    """Raise CalibrationError if lm-evaluation-harness is not installed."""
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError:
        raise CalibrationError(
            "zero-shot tasks run through lm-evaluation-harness, which is not installed: "
            "pip install 'quatom[eval]'"
        ) from None


@checked()
def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    data_dir: str | Path | None = None,
    limit: Annotated[int, Range(1)] | None = None,
    batch_tokens: Annotated[int, Range(1)] = 4096,
    cache: str | Path | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run tasks and return one entry of `zeroshot-MODEL.json` per task and metric.

    Args:
        tasks: names of the harness.
        data_dir: folder with TASK/SPLIT.jsonl; None downloads the data.
        limit: only the first examples of each task.
        batch_tokens: tokens per forward pass.
        cache: folder of answers; an interrupted run goes on from them.
        model_name: shown in tables; None: the last part of the source.
        progress: show a progress bar on stderr.

    Raises:
        ArgumentError: an argument is of another kind than it says here.
        CalibrationError: the harness is missing, a task is unknown or its data cannot be had.
        ModelError: the model has no tokenizer.
    """
    find_harness()
    from lm_eval.evaluator import evaluate

    from quatom.evaluation.harness_model import QuatomLM
    from quatom.evaluation.harness_tasks import load_tasks, quiet
    from quatom.evaluation.request_cache import RequestCache, model_key

    harness_tasks = load_tasks(tasks, None if data_dir is None else Path(data_dir))
    answers = None if cache is None else RequestCache(Path(cache), model_key(loaded))
    try:
        model = QuatomLM(loaded, batch_tokens=batch_tokens, cache=answers, progress=progress)
        with quiet():
            outcome = evaluate(
                model,
                {"tasks": harness_tasks, "groups": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    finally:
        if answers is not None:
            answers.close()
    assert outcome is not None  # only ranks other than 0 get None
    name = model_name or Path(loaded.source).name
    return [entry for task in outcome["results"] for entry in _entries(name, loaded, task, outcome)]


def _entries(
    name: str, loaded: LoadedModel, task: str, outcome: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry per metric, in the harness's own words for them."""
    samples = outcome["n-samples"][task]
    entries = []
    for key, value in outcome["results"][task].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        entry = {
            "model": name,
            "recipe": loaded.recipe.name,
            "task": task,
            "metric": metric if filter_name == "none" else key,
            "value": float(value),
            "examples": samples["effective"],
            "all_examples": samples["effective"] == samples["original"],
            "num_fewshot": outcome["n-shot"][task],
            "task_version": outcome["versions"].get(task),
            "harness": version("lm_eval"),
            "backend": loaded.backend_name,
        }
        entries.append(entry | {"standard_error": of_accuracy(entry)})
    return entries
