"""lm-evaluation-harness by its own door: the numbers of `quatom eval --tasks`."""

import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval' (pip install 'quatom[eval]')")

from quatom.evaluation.harness_tasks import load_tasks
from quatom.evaluation.zero_shot import evaluate_tasks
from quatom.loading import load
from tests.evaluation.task_rows import write_task_rows
from tests.integrations.checkpoints import tiny_checkpoint, tiny_recipe

TASKS = ("piqa", "arc_easy")


def test_the_harness_gives_the_numbers_of_quatom_eval(tiny_llama_dir, text_file, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import quatom.integrations.lm_eval  # noqa: F401  makes the model known

    rows = write_task_rows(tmp_path)
    folder = tiny_checkpoint(tmp_path, tiny_llama_dir, tiny_recipe("quatom-w4a8kv4"), text_file)
    own = evaluate_tasks(load(folder), TASKS, data_dir=rows, progress=False)
    found = simple_evaluate(
        model="quatom",
        model_args=f"pretrained={folder},batch_tokens=512",
        tasks=list(load_tasks(TASKS, rows).values()),
        task_manager=TaskManager(include_defaults=False),  # else it reads thousands of files
        bootstrap_iters=0,
    )
    for entry in own:
        assert found["results"][entry["task"]][f"{entry['metric']},none"] == entry["value"]


def test_unknown_arguments_are_refused(tiny_llama_dir):
    from quatom.errors import RequestError
    from quatom.integrations.lm_eval import QuatomHarnessModel

    with pytest.raises(RequestError, match="model_args has parallelize; known are pretrained"):
        QuatomHarnessModel(str(tiny_llama_dir), parallelize=True)


def test_the_command_is_the_harness_s_own():
    command = [sys.executable, "-m", "quatom.integrations.lm_eval", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--model_args" in done.stdout
