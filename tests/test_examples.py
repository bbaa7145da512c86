"""Every example runs, on a tiny model, with public names alone."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

import quatom
from tests.conftest import LLAMA, make_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN_HERE = {
    "quantize_and_serve",
    "batch_file",
    "custom_recipe",
    "chat_calibration",
    "python_service",
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


def test_python_service(example, model):
    assert example("python_service", model).count(" -> ") == 16
