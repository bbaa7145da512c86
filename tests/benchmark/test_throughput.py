"""`quatom bench throughput` on the CPU: counts that are exact whatever the clock says."""

import gc
import json
import weakref
from dataclasses import replace

import pytest

from quatom.benchmark.fixed_batch import largest_batch, measure_batches, prompt_lengths
from quatom.benchmark.offline_run import run_offline
from quatom.benchmark.random_weights import random_model
from quatom.benchmark.roofline import Ceilings
from quatom.benchmark.serving_results import add_entries, identity, make_entry, read_entries
from quatom.benchmark.throughput import Setting, measure_fixed_batches, measure_throughput
from quatom.benchmark.throughput_models import benchmark_models
from quatom.benchmark.workloads import Workload, fixed_lengths
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.startup import GIB, bytes_in_use
from quatom.errors import EngineError, ModelError
from quatom.presets import PRESETS

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
FORM = {  # the keys that every entry of a serving file has
    "mode",
    "model",
    "recipe",
    "gpu_memory_gb",
    "requests",
    "input_tokens",
    "output_tokens",
    "request_rate",
    "output_tokens_per_s",
    "total_tokens_per_s",
    *LATENCIES,
    "max_running",
    "kv_tokens",
    "share_of_limit",
    "seconds",
}
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def loaded():
    return random_model("tiny", PRESETS["atom-w4a4kv4"], device="cpu")


def setting(loaded, **changes):
    given = {
        "loaded": loaded,
        "model": "tiny",
        "gpu_memory": None,
        "config": CONFIG,
        "ceilings": Ceilings(0.001, 0.01, 0.02),
    }
    return Setting(**(given | changes))


def test_an_entry_counts_every_token(loaded):
    workload = Workload("mixed", ((20, 5), (40, 9), (3, 1), (33, 16), (9, 2)))
    entry = measure_throughput(setting(loaded), workload)
    assert entry.keys() >= FORM
    assert entry["mode"] == "throughput"
    assert (entry["model"], entry["recipe"]) == ("tiny", "atom-w4a4kv4")
    assert entry["output_tokens_per_s"] == pytest.approx(33 / entry["seconds"], rel=0.01)
    assert entry["total_tokens_per_s"] == pytest.approx(138 / entry["seconds"], rel=0.01)
    assert entry["max_running"] == 4
    assert 0 < entry["mean_running"] <= 4
    assert entry["preemptions"] == 0
    assert entry["share_of_limit"] > 0
    assert all(entry[key]["p50"] > 0 for key in LATENCIES)
    assert entry["e2e_ms"]["p99"] <= entry["seconds"] * 1e3
    assert entry["timeline"]["running"][-1] == 0
    assert max(entry["timeline"]["waiting"]) >= 1
    one = measure_throughput(setting(loaded, ceilings=None), fixed_lengths(1, 8, 3))
    assert one["mode"] == "latency"
    assert one["share_of_limit"] is None


def test_a_run_reports_each_request(loaded):
    engine = Engine(loaded, replace(CONFIG, prefix_caching=False))
    result = run_offline(engine, [[1] * 10, [2] * 30], [4, 7])
    assert [r.output_tokens for r in result.requests] == [4, 7]
    assert [r.input_tokens for r in result.requests] == [10, 30]
    assert len(result.intervals) == 3 + 6
    for r in result.requests:
        assert 0 < r.first_token < r.last_token <= result.seconds
    assert len(result.timeline.samples) == result.steps


def test_preemptions_are_counted(loaded, monkeypatch):
    engine = Engine(loaded, replace(CONFIG, prefix_caching=False))
    engine.scheduler.num_preemptions = 5  # of an earlier run
    schedule = engine.scheduler.schedule

    def preempting():
        engine.scheduler.num_preemptions += 1
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", preempting)
    result = run_offline(engine, [[1] * 30], [6])
    assert result.preemptions == result.steps


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_a_run_on_a_gpu_stays_within_its_budget():
    model = random_model("tiny", PRESETS["atom-w4a4kv4"], device="cuda")
    gpu_memory = (bytes_in_use(model) + 4 * GIB) / GIB
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512)
    entry = measure_throughput(
        setting(model, gpu_memory=gpu_memory, config=config), fixed_lengths(100, 200, 50)
    )
    assert entry["gpu_memory_used_gb"] <= gpu_memory
    # What is not cache is small: a tiny model's activations, its graphs, and the reserve.
    cache = entry["kv_tokens"] * 4 * 2 * 36  # 2 layers x 2 heads x K and V of 32 + 4 bytes
    assert cache > 2 * GIB


def test_fixed_batches(loaded):
    gpu_memory = (bytes_in_use(loaded) + 400_000) / GIB
    entries = measure_fixed_batches(
        setting(loaded, gpu_memory=gpu_memory), [1, 3, 1000], 40, steps=4
    )
    assert [(e["batch"], e["comparison"]) for e in entries] == [
        (1, "equal batch"),
        (3, "equal batch"),
    ]
    for entry in entries:
        assert entry.keys() >= FORM
        assert entry["mode"] == "batch"
        rate = entry["batch"] * 4 / entry["seconds"]
        assert entry["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)
        assert entry["itl_ms"]["p50"] > 0
        assert entry["ttft_ms"] is None
    assert entries[1]["context"] == pytest.approx(40, abs=2)


def test_prompts_that_run_earlier_are_shorter():
    # Steps of 12 tokens: the last prompt takes 10 / 10 of a step beside two decodes, the second
    # 9 / 11 beside one; what the others generate meanwhile is rounded to a token.
    assert prompt_lengths(3, 10, 12) == [8, 9, 10]
    assert prompt_lengths(1, 10, 12) == [10]
    assert prompt_lengths(4, 2, 4) == [1, 1, 1, 2]


def test_all_sequences_of_a_batch_have_about_the_same_context(loaded):
    config = replace(
        CONFIG,
        max_num_seqs=24,
        prefix_caching=False,
        forecast_admission=False,
    )
    engine = Engine(loaded, config)
    (timing,) = measure_batches(engine, [24], 200, 4)
    assert timing.context == pytest.approx(200, abs=3)
    assert timing.tokens_per_second == pytest.approx(24 * 4 / sum(timing.step_seconds))
    assert not engine.has_work
    engine.check_accounting()


def test_the_largest_batch_fills_the_budget(loaded):
    gpu_memory = (bytes_in_use(loaded) + 400_000) / GIB
    entries = measure_fixed_batches(setting(loaded, gpu_memory=gpu_memory), [2, None], 40, steps=4)
    assert [e["comparison"] for e in entries] == ["equal batch", "equal memory"]
    largest = entries[1]["batch"]
    # 40 + 4 + 4 + 16 tokens are two blocks of 32; 1 % of the blocks stays free for growth.
    assert largest == int(0.99 * entries[1]["kv_tokens"] / 32) // 2
    assert largest > 2


def test_a_batch_that_falls_apart_is_no_measurement(loaded):
    layers = loaded.model.allocate_kv_cache(1, 32)
    blocks = 6 * sum(layer.bytes_per_block for layer in layers)
    config = replace(CONFIG, kv_cache_memory=blocks, max_model_len=100, prefix_caching=False)
    engine = Engine(loaded, replace(config, forecast_admission=False))
    assert largest_batch(engine, 40, 4) == 2
    with pytest.raises(EngineError, match="6 blocks is too small for a decode batch of 3: "):
        measure_batches(engine, [3], 60, 20)


def test_models_one_after_another_leave_no_memory_behind():
    models = benchmark_models(
        None,
        "tiny",
        [PRESETS["fp16"], PRESETS["w8a8"]],
        device="cpu",
        dtype=None,
        num_layers=1,
        seed=0,
        gpu_memory=1.0,
    )
    name, loaded = next(models)
    assert (name, loaded.recipe.name, len(loaded.model.blocks)) == ("tiny, 1 layers", "fp16", 1)
    gone = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert gone() is None
    assert next(models)[1].recipe.name == "w8a8"


def test_what_cannot_be_run_is_refused_before_it_is_made():
    def first(model, shape, recipe="fp16", **more):
        options = {"num_layers": None, "seed": 0, "gpu_memory": None} | more
        return next(
            benchmark_models(model, shape, [PRESETS[recipe]], device="cpu", dtype=None, **options)
        )

    with pytest.raises(ModelError, match="either MODEL or --random-weights"):
        first(None, None)
    with pytest.raises(ModelError, match="either MODEL or --random-weights"):
        first("folder", "tiny")
    with pytest.raises(ModelError, match="folder has its own"):
        first("folder", None)
    with pytest.raises(EngineError, match=r"llama-2-70b as fp16 take 128\.5 GiB, the budget is 80"):
        first(None, "llama-2-70b", gpu_memory=80.0)


def entry(**changes):
    given = {"mode": "batch", "model": "m", "recipe": "r", "gpu_memory_gb": 24.0, "batch": 8}
    return make_entry(**(given | changes))


def test_entries_are_replaced_by_newer_ones_of_the_same_measurement(tmp_path):
    path = tmp_path / "serving.json"
    add_entries(path, [entry(output_tokens_per_s=1.0), entry(batch=16)], {"copy_tb_s": 3.0})
    add_entries(path, [entry(output_tokens_per_s=2.0)], None)
    kept = read_entries(path)
    assert [(e["batch"], e.get("output_tokens_per_s")) for e in kept] == [(16, None), (8, 2.0)]
    assert {"command", "commit", "date"} <= kept[0].keys()
    assert json.loads(path.read_text())["format"] == 1
    path.write_text("[]")
    with pytest.raises(EngineError, match="is no result file"):
        read_entries(path)


def test_engines_and_numbers_of_gpus_are_measurements_of_their_own(tmp_path):
    path = tmp_path / "vllm.json"
    engines = [{}, {"engine": "vllm+quatom"}, {"engine": "vllm+quatom", "tensor_parallel": 2}]
    for changes in engines:
        program = ("python", "scripts/bench_vllm.py") if changes else ()
        add_entries(path, [entry(**changes)], None, program)
    assert len(read_entries(path)) == 3
    commands = [e["command"].split()[0] for e in read_entries(path)]
    assert commands == ["quatom", "python", "python"]


def test_the_batch_that_fits_is_one_measurement_whatever_its_size():
    same = [entry(comparison="equal memory", batch=b) for b in (30, 31)]
    assert identity(same[0]) == identity(same[1])
    assert identity(entry(comparison="equal batch")) != identity(
        entry(comparison="equal batch", batch=9)
    )
    assert identity(entry(recipe="other")) != identity(entry())


def test_timelines_are_written_on_one_line_each(tmp_path):
    path = tmp_path / "serving.json"
    columns = {"seconds": [0.0, 1.5], "running": [1, -2]}
    add_entries(path, [entry(timeline=columns)], None)
    assert read_entries(path)[0]["timeline"] == columns
    assert '"seconds": [0.0, 1.5],' in path.read_text()
