"""What happens before the first request: a cache within the budget, every kind of step run once."""

from dataclasses import replace

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.engine import startup
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.startup import GIB, build_engine, bytes_in_use, step_sizes
from quatom.errors import EngineError
from quatom.presets import PRESETS

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def loaded():
    return random_model("tiny", PRESETS["atom-w4a4kv4"], device="cpu")


@pytest.mark.parametrize("max_model_len", [2, 15, 200])
def test_the_largest_step_fits_any_model_length(max_model_len, loaded):
    engine = Engine(loaded, EngineConfig(max_model_len=max_model_len, max_num_seqs=2))
    engine._run_largest_step(loaded)
    engine.check_accounting()
    assert not engine.has_work


def test_a_budget_is_weights_and_cache(loaded):
    used = bytes_in_use(loaded)
    config = replace(CONFIG, max_model_len=64, prefix_caching=False)
    engine = build_engine(loaded, config, (used + 300_000) / GIB)
    per_block = engine.kv_cache_bytes // engine.pool.num_blocks
    assert 300_000 - per_block < engine.kv_cache_bytes <= 300_000
    with pytest.raises(EngineError, match=r"atom-w4a4kv4 takes .* the budget is 0\.00 GiB"):
        build_engine(loaded, config, 0.5 * used / GIB)


class FakeEngine:
    """Takes the cache that it is told to, and half a GiB besides."""

    max_model_len = 4096
    used = 3 * GIB  # context and weights, before any engine
    made = ()

    def __init__(self, loaded, config):
        self.kv_cache_bytes = config.kv_cache_memory
        FakeEngine.made += (config.kv_cache_memory,)
        FakeEngine.used += self.kv_cache_bytes + GIB // 2

    def __del__(self):
        FakeEngine.used -= self.kv_cache_bytes + GIB // 2


def test_on_a_gpu_the_cache_gets_what_a_trial_leaves(loaded, monkeypatch):
    on_gpu = replace(loaded, device=torch.device("cuda"))
    total = 80 * GIB
    monkeypatch.setattr(startup, "Engine", FakeEngine)
    monkeypatch.setattr(startup, "warm_up", lambda engine: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - FakeEngine.used, total))
    config = replace(CONFIG, max_model_len=64)
    engine = build_engine(on_gpu, config, 24.0)
    trial, final = FakeEngine.made
    assert final == engine.kv_cache_bytes == 24 * GIB - 3 * GIB - GIB // 2 - startup.RESERVE
    assert 0 < trial < final
    assert FakeEngine.used == 24 * GIB - startup.RESERVE
    with pytest.raises(EngineError, match=r"90\.00 GiB is more than the GPU's 80\.00 GiB"):
        build_engine(on_gpu, config, 90.0)


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {"max_waiting": 2}], ids=str)
def test_warm_up_runs_every_size(options, loaded, monkeypatch):
    assert step_sizes(20) == [1, 2, 3, 4, 6, 8, 12, 16, 17, 20]
    engine = Engine(loaded, replace(CONFIG, max_model_len=48, **options))
    sizes, batches = set(), set()
    launch = engine.runner.launch

    def recording(step):
        sizes.add(step.num_tokens)
        batches.add((len(step.items), max(item.count for item in step.items)))
        return launch(step)

    monkeypatch.setattr(engine.runner, "launch", recording)
    startup.warm_up(engine)
    # Prompts of up to 46 tokens: steps above 92 take three, which a queue of two does not hold.
    larger = set() if "max_waiting" in options else {96, 128}
    assert {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64} | larger <= sizes
    # A full decode batch, or as many as the queue lets in at a time.
    assert (min(4, options.get("max_waiting", 4)), 1) in batches
    assert any(count == 2 and most > 1 for count, most in batches)  # a decode beside a prompt
    scheduler = engine.scheduler  # a server's metrics begin at zero
    assert (scheduler.prefix_queries, scheduler.prefix_hits, scheduler.num_preemptions) == (0, 0, 0)
    assert not engine.has_work
    engine.check_accounting()
