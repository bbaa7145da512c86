"""What can be known before the work is told before it: the model is not even loaded."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from quatom.errors import CalibrationError, ModelError
from quatom.plan import ModelPlan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec
from tests.checkpoint.gguf_models import write_gguf

RECIPE = replace(
    PRESETS["atom-w4a4kv4"], calibration=CalibrationSpec(num_samples=2, sequence_length=24)
)


@pytest.fixture
def never(monkeypatch):
    """Loading a model is a failure of the test."""

    def open_source(*_):
        raise AssertionError("the model was loaded")

    # Not `load` itself: modules that are first imported meanwhile would keep the replacement.
    monkeypatch.setattr("quatom.loading.open_source", open_source)


@pytest.mark.parametrize("content", [None, b"a\0b", b"\xff\xfe"])
@pytest.mark.parametrize("command", ["eval", "agree"])
def test_a_bad_text_is_found_before_the_model_is_loaded(
    command, content, never, small_dir, shell, tmp_path
):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    options = {
        "eval": ("--perplexity", tmp_path / "a.txt"),
        "agree": (tmp_path / "out.json", "--record", tmp_path / "a.txt"),
    }[command]
    assert "a.txt" in shell.fails(command, small_dir, *options)


def test_a_corpus_that_is_not_there_is_found_before(never, small_dir, shell, tmp_path):
    error = shell.fails("eval", small_dir, "--perplexity", "ptb", "--data-dir", tmp_path)
    assert "holds no ptb" in error


def test_a_missing_harness_is_found_before(never, small_dir, shell, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "pip install 'quatom[eval]'" in shell.fails("eval", small_dir, "--tasks", "piqa")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_that_inspect_cannot_write_are_found_before(
    option, small_dir, shell, monkeypatch, tmp_path
):
    monkeypatch.setattr("quatom.checkpoint.reader.open_source", lambda _: pytest.fail("opened"))
    assert "none is no folder" in shell.fails("inspect", small_dir, option, tmp_path / "none" / "x")
    assert "is a folder: give the name" in shell.fails("inspect", small_dir, option, tmp_path)


RECORDED = {
    "model": "m", "recipe": "r", "backend": "cpu",
    "prompts": [[1, 2]], "tokens": [[3]], "logprobs": [[-1.0]], "gaps": [[0.5]],
}  # fmt: skip
WRONG = {
    "no file": None,
    "a list": "[1]",
    "rows of other lengths": json.dumps(RECORDED | {"gaps": [[0.5, 1.0]], "tokens": [[3], [4]]}),
    "no prompts": json.dumps(RECORDED | {"prompts": [], "tokens": [], "logprobs": [], "gaps": []}),
    "an empty prompt": json.dumps(RECORDED | {"prompts": [[]]}),
    "words": json.dumps(RECORDED | {"tokens": [["a"]]}),
    "no numbers": json.dumps(RECORDED | {"logprobs": [[None]]}),
    "no rows": json.dumps(RECORDED | {"gaps": 3}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_choices_of_another_form_are_found_before(kind, never, small_dir, shell, tmp_path):
    if WRONG[kind] is not None:
        (tmp_path / "choices.json").write_text(WRONG[kind])
    assert "choices.json" in shell.fails("agree", small_dir, tmp_path / "choices.json")


def test_choices_of_another_model_are_refused(small_dir, shell, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(RECORDED | {"tokens": [[5000]]}))
    error = shell.fails("agree", small_dir, tmp_path / "c.json")
    assert "token id 5000, and the model has 260 tokens: they are of another model, m" in error


def test_recording_says_what_it_did_and_nothing_else_is_written(
    small_dir, text_file, shell, tmp_path
):
    few = ("--num-prompts", 2, "--prompt-tokens", 4, "--num-tokens", 3)
    done = shell("agree", small_dir, tmp_path / "c.json", "--record", text_file, *few)
    assert done.status == 0, done
    assert done.out.startswith(
        "Recorded 6 choices of fp16 on torch, 3 after each of 2 prompts, in "
    )
    error = shell.fails("agree", small_dir, tmp_path / "no" / "c.json", "--record", text_file, *few)
    assert "no is no folder" in error
    (tmp_path / "a.txt").write_text("[PAD]" * 20)
    padded = shutil.copytree(small_dir, tmp_path / "padded")
    settings = json.loads((padded / "tokenizer_config.json").read_text())
    added = {str(258 + i): {"content": f"[P{i}]"} for i in range(3)} | {"261": {"content": "[PAD]"}}
    (padded / "tokenizer_config.json").write_text(
        json.dumps(settings | {"added_tokens_decoder": added})
    )
    error = shell.fails("agree", padded, tmp_path / "d.json", "--record", tmp_path / "a.txt", *few)
    assert "gives token id 261, and the model has 260 tokens" in error


def test_a_tokenizer_that_cannot_be_written_is_found_before_the_blocks(tmp_path, monkeypatch):
    """A recipe without calibration reads no text, and copies the tokenizer at its end."""
    from quatom.quantize import pipeline

    monkeypatch.setattr(pipeline, "_quantize_blocks", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(ModelPlan, "check_cache", lambda _: None)  # its heads are tiny
    write_gguf(tmp_path / "m.gguf", pre="unheard-of")
    with pytest.raises(ModelError, match="pre-tokenizer 'unheard-of' is not supported"):
        quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "q", "w8a8")
    assert not (tmp_path / "q.partial").exists()


TENSORS = {
    "one row": torch.zeros(48, dtype=torch.int64),
    "floats": torch.zeros(2, 24),
    "truth values": torch.zeros(2, 24, dtype=torch.bool),
    "nothing": torch.zeros(0, 24, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_hold_no_sequences_are_refused(kind, small_dir, tmp_path):
    with pytest.raises(CalibrationError, match=r"must be \(samples, length\) integers, .* got \("):
        quantize_checkpoint(small_dir, tmp_path / "q", RECIPE, calibration=TENSORS[kind])
    assert list(tmp_path.iterdir()) == []


def test_the_length_that_counts_is_the_tensors(small_dir, tmp_path):
    tokens = torch.arange(48).view(2, 24)
    long = replace(RECIPE, calibration=CalibrationSpec(num_samples=2, sequence_length=2048))
    quantize_checkpoint(small_dir, tmp_path / "a", long, calibration=tokens.int())
    quantize_checkpoint(small_dir, tmp_path / "b", long, calibration=tokens)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    with pytest.raises(CalibrationError, match="sequences of 200 tokens are longer than"):
        quantize_checkpoint(
            small_dir, tmp_path / "c", RECIPE, calibration=torch.zeros(1, 200, dtype=torch.int64)
        )


def test_names_that_break_lines_are_escaped(small_dir, shell, tmp_path):
    folder = shutil.copytree(small_dir, tmp_path / "a\nb\x1b[31m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"x\ny": 1}))
    error = shell.fails("generate", folder, "--prompt", "a")
    assert r"a\nb\x1b[31m" in error
    assert r"x\ny" in error


def test_a_name_too_long_for_a_folder_is_refused(small_dir, text_file, shell, tmp_path):
    error = shell.fails("quantize", small_dir, tmp_path / ("q" * 250), "--calibration", text_file,
                        "--num-samples", 2, "--sequence-length", 24)  # fmt: skip
    assert "has 250 bytes, more than the 247" in error
