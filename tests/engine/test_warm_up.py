"""The step that measures a GPU's activation memory, run on a CPU."""

import pytest

from quatom.benchmark.random_weights import random_model
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.recipe import PRESETS


@pytest.mark.parametrize("max_model_len", [2, 15, 200])
def test_the_largest_step_fits_any_model_length(max_model_len):
    loaded = random_model("tiny", PRESETS["quatom-w4a4kv4"], device="cpu")
    engine = Engine(loaded, EngineConfig(max_model_len=max_model_len, max_num_seqs=2))
    engine._run_largest_step(loaded.model)
    engine.check_accounting()
    assert not engine.has_work
