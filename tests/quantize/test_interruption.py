"""Killed with SIGKILL at any moment and resumed, a run writes the bytes of an uninterrupted one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quatom.errors import CheckpointError, QuatomError
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import Recipe
from tests.checkpoint.models import CONFIG, write_model
from tests.conftest import write_byte_tokenizer
from tests.quantize.killer import RECIPE, contents

FOUR_BLOCKS = CONFIG | {
    "vocab_size": 260,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def four_block_dir(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "four", FOUR_BLOCKS, shards=2)
    write_byte_tokenizer(folder)
    return folder


def test_a_killed_run_resumes_to_the_same_bytes(text_file, tmp_path):
    source = write_model(tmp_path / "two", FOUR_BLOCKS | {"num_hidden_layers": 2}, shards=2)
    write_byte_tokenizer(source)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantize.killer", source, text_file, tmp_path / "work"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    planned = [outcome for outcome in outcomes if "call" in outcome["what"]]
    at_random = [outcome for outcome in outcomes if "random" in outcome["what"]]
    assert len(planned) >= 9
    for outcome in planned:
        assert outcome["ends"] == ["killed", "done"], (outcome, done.stderr)
        assert outcome["left"] == [], outcome
        assert "half" not in outcome["what"], outcome
    ends = [end for outcome in at_random for end in outcome["ends"]]
    assert ends.count("killed") >= 3, at_random
    assert set(ends) == {"killed", "done"}, (at_random, done.stderr)
    for outcome in outcomes:
        assert outcome["equal"], outcome


class StopError(Exception):
    """Raised by a progress callback in place of an interruption."""


def interrupt(source, target, text, recipe=RECIPE, after=1):
    def stop(block):
        if block.index == after:
            raise StopError

    with pytest.raises(StopError):
        quantize_checkpoint(source, target, recipe, calibration=text, on_block=stop)


def test_a_resumed_run_does_only_what_is_left(four_block_dir, text_file, tmp_path):
    interrupt(four_block_dir, tmp_path / "q", text_file, after=2)
    seen = []
    quantize_checkpoint(
        four_block_dir,
        tmp_path / "q",
        RECIPE,
        calibration=text_file,
        resume=True,
        on_block=lambda block: seen.append(block.index),
    )
    assert seen == [3]


@pytest.mark.parametrize(("seconds", "resumed_at"), [(3600.0, 0), (0.0, 3)])
def test_large_states_are_saved_now_and_then_and_resumed_from(
    seconds, resumed_at, four_block_dir, text_file, tmp_path, monkeypatch
):
    quantize_checkpoint(four_block_dir, tmp_path / "whole", RECIPE, calibration=text_file)
    monkeypatch.setattr("quatom.quantize.block_log.LARGE_STATE", 0)
    monkeypatch.setattr("quatom.quantize.block_log.STATE_SECONDS", seconds)
    interrupt(four_block_dir, tmp_path / "q", text_file, after=2)
    states = list((tmp_path / "q.partial" / "state").glob("after-*"))
    assert [file.name for file in states] == (["after-2.safetensors"] if resumed_at else [])
    seen = []
    quantize_checkpoint(
        four_block_dir,
        tmp_path / "q",
        RECIPE,
        calibration=text_file,
        resume=True,
        on_block=lambda block: seen.append(block.index),
    )
    assert seen == list(range(resumed_at, 4))
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", r"recipe\.weights\.clip_ratio = 0\.85.*0\.9"),
        ("seed", r"recipe\.calibration\.seed"),
        ("text", "calibration"),
        ("dtype", "dtype"),
        ("source", "source"),
    ],
)
def test_another_run_does_not_resume_this_one(change, message, four_block_dir, text_file, tmp_path):
    interrupt(four_block_dir, tmp_path / "q", text_file)
    source, text, recipe, options = four_block_dir, text_file, RECIPE, {}
    if change == "recipe":
        recipe = replace(recipe, weights=replace(recipe.weights, clip_ratio=0.9))
    elif change == "seed":
        recipe = replace(recipe, calibration=replace(recipe.calibration, seed=1))
    elif change == "text":
        text = tmp_path / "other.txt"
        text.write_text("another text " * 100)
    elif change == "dtype":
        import torch

        options = {"dtype": torch.bfloat16}
    else:
        config = FOUR_BLOCKS | {"rms_norm_eps": 1e-6}
        source = write_model(tmp_path / "other", config)
        write_byte_tokenizer(source)
    kept = contents(tmp_path / "q.partial")
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(
            source, tmp_path / "q", recipe, calibration=text, resume=True, **options
        )
    assert contents(tmp_path / "q.partial") == kept
    # The interrupted run itself still goes on.
    quantize_checkpoint(four_block_dir, tmp_path / "q", RECIPE, calibration=text_file, resume=True)


def test_an_interrupted_run_in_the_way_is_named(four_block_dir, text_file, tmp_path):
    interrupt(four_block_dir, tmp_path / "q", text_file)
    with pytest.raises(CheckpointError, match=r"q\.partial holds an interrupted run.*--resume"):
        quantize_checkpoint(four_block_dir, tmp_path / "q", RECIPE, calibration=text_file)


def test_resume_without_an_earlier_run_begins_one(four_block_dir, text_file, tmp_path):
    quantize_checkpoint(four_block_dir, tmp_path / "q", RECIPE, calibration=text_file, resume=True)
    assert (tmp_path / "q" / "config.json").exists()


def test_the_same_seed_and_text_give_the_same_bytes(four_block_dir, text_file, tmp_path):
    again = replace(RECIPE, calibration=replace(RECIPE.calibration, seed=7))
    for name, recipe in (("a", RECIPE), ("b", RECIPE), ("c", again)):
        quantize_checkpoint(four_block_dir, tmp_path / name, recipe, calibration=text_file)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == other.keys()
    differing = {name for name in first if first[name] != other[name]}
    # Every block's tensors, the report and the recipe in config.json; nothing else.
    blocks = {f"model-{i:05d}-of-00005.safetensors" for i in range(2, 6)}
    assert differing == blocks | {"config.json", "quatom_report.json"}


def test_recipes_without_calibration_resume_too(four_block_dir, tmp_path):
    recipe = Recipe.from_dict(
        {
            "weights": {"rounder": {"method": "nearest"}},
            "outliers": {"channels": 0},
        }
    )
    interrupt(four_block_dir, tmp_path / "q", None, recipe)
    quantize_checkpoint(four_block_dir, tmp_path / "q", recipe, resume=True)
    quantize_checkpoint(four_block_dir, tmp_path / "whole", recipe)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_an_existing_target_stays_as_it_is(four_block_dir, text_file, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("precious")
    for resume in (False, True):
        with pytest.raises(QuatomError, match="q exists; choose another target or delete it"):
            quantize_checkpoint(
                four_block_dir, tmp_path / "q", RECIPE, calibration=text_file, resume=resume
            )
    assert contents(tmp_path) == {"q/mine": b"precious"}
