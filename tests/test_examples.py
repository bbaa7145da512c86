"""Every example runs, on a tiny model, with public names alone."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

import quatom
from tests.conftest import LLAMA, make_model
from tests.evaluation.task_rows import write_task_rows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN_HERE = {
    "quantize_and_serve",
    "batch_file",
    "custom_recipe",
    "chat_calibration",
    "python_service",
    "evaluate_with_lm_eval",
}
SHORT = ("--samples", "2", "--length", "24")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One block, a chat template, a byte tokenizer."""
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("examples") / "model"
    return make_model(folder, config | {"num_key_value_heads": 1})


@pytest.fixture
def example(monkeypatch, capfd):
    """Run an example as a script; what it and its child processes print."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_all_examples_are_run():
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == RUN_HERE | {"demo"}  # make demo runs that one; it needs a model from PyPI


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names_alone(path):
    tree = ast.parse(path.read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert not {name for name in imported if name.startswith("quatom.")}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "quatom"
    }
    assert used <= set(quatom.__all__)


def test_quantize_and_serve(example, model, text_file, tmp_path):
    out = example("quantize_and_serve", model, text_file, tmp_path / "q", *SHORT)
    assert "bits per weight" in out
    assert quatom.load(tmp_path / "q").recipe.name == "quatom-w4a8kv4"


def test_batch_file(example, model, tmp_path):
    out = example("batch_file", model, tmp_path)
    assert out.count(" -> ") == 3
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


def test_custom_recipe(example, model, text_file, tmp_path):
    out = example(
        "custom_recipe", model, text_file, text_file, tmp_path / "q", *SHORT, "--windows", "1"
    )
    assert out.count("perplexity") == 5
    stored = json.loads((tmp_path / "q" / "rung-3" / "config.json").read_text())
    recipe = stored["quantization_config"]["recipe"]
    assert (recipe["name"], recipe["activations"]["format"]) == ("mine", "int8")


def test_chat_calibration(example, model, tmp_path):
    out = example("chat_calibration", model, tmp_path / "q", *SHORT)
    assert "bits per weight" in out
    assert json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])["messages"]


def test_evaluate_with_lm_eval(example, model, tmp_path):
    pytest.importorskip("lm_eval")
    write_task_rows(tmp_path)
    words = "--tasks", "piqa,boolq", "--data-dir", tmp_path, "--limit", 2
    lines = example("evaluate_with_lm_eval", model, model, *words).splitlines()
    assert lines[0].split() == ["task", "metric", "float", "quantized"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["piqa", "acc"],
        ["piqa", "acc_norm"],
        ["boolq", "acc"],
    ]
    for line in lines[1:]:
        before, after = line.split()[2:]
        assert before == after  # the same model twice


def cells(kind):
    notebook = json.loads((EXAMPLES / "quantize_and_compare.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_stored_without_output_and_uses_public_names():
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "quatom":
                assert node.attr in quatom.__all__


@pytest.mark.slow
def test_the_notebook_runs(model, text_file, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    pytest.importorskip("ipykernel")
    environment = {
        "QUATOM_MODEL": str(model),
        "QUATOM_TEXT": str(text_file),
        "QUATOM_SAMPLES": "2",
        "QUATOM_LENGTH": "24",
        "TMPDIR": str(tmp_path),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "quantize_and_compare.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "bits per weight" in shown
    assert shown.count("perplexity") == 2
    assert shown.count(" -> ") == 2
    assert any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )


def test_python_service(example, model):
    assert example("python_service", model).count(" -> ") == 16
