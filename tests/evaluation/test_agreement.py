"""Agreement of choices: a model with itself, with a damaged copy, and what the file format says."""

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.engine.config import EngineConfig
from quatom.errors import CheckpointError, EngineError
from quatom.evaluation.agreement import Choices, compare_choices, cut_prompts, record_choices
from quatom.presets import PRESETS

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=64)
PROMPTS = [[5 + i, 90 + i, 7, 300, 11 * i + 1] for i in range(4)]


def model(seed=0):
    return random_model("tiny", PRESETS["quatom-w4a4kv4"], device="cpu", seed=seed)


@pytest.fixture(scope="module")
def recorded():
    return record_choices(model(), PROMPTS, 12, CONFIG)


def test_a_model_agrees_with_itself(recorded):
    measured = compare_choices(model(), recorded, CONFIG)
    assert (measured.positions, measured.agreeing, measured.unexplained) == (48, 48, 0)
    assert measured.share == 1.0
    # Decode steps of four rows, alone or after prefill: the same rows in the same products.
    assert measured.largest_difference <= 1e-4
    assert measured.repeatable


def test_another_model_is_fed_the_recorded_tokens_and_differs(recorded):
    other = compare_choices(model(seed=1), recorded, CONFIG)
    assert other.share < 0.2
    assert other.noise > 0.1
    assert other.largest_gap > 0.0


def test_a_small_change_is_noise_and_a_wrong_choice_beyond_it_is_counted(recorded):
    damaged = model()
    with torch.no_grad():  # one token's score is lifted: it wins where it was far behind
        damaged.model.head[17] = damaged.model.head[int(recorded.tokens[0][0])] * 3.0
    measured = compare_choices(damaged, recorded, CONFIG)
    assert measured.agreeing < measured.positions
    quiet = Choices(
        **{
            **{name: getattr(recorded, name) for name in Choices.__slots__},
            "gaps": [[50.0] * 12] * 4,
        }
    )
    assert compare_choices(damaged, quiet, CONFIG).unexplained == (
        measured.positions - measured.agreeing
    )


def test_choices_are_saved_and_read_back(recorded, tmp_path):
    recorded.save(tmp_path / "c.json")
    assert Choices.read(tmp_path / "c.json") == recorded
    (tmp_path / "d.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"d\.json holds no recorded choices"):
        Choices.read(tmp_path / "d.json")


def test_prompts_are_spread_over_the_text():
    assert cut_prompts(range(100), 3, 2) == [[0, 1], [33, 34], [66, 67]]
    with pytest.raises(EngineError, match="3 prompts of 40 tokens need 120 tokens"):
        cut_prompts(range(100), 3, 40)
