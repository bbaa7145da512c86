"""Charging time to the parts of a step."""

import pytest

from quatom.benchmark import step_profile
from quatom.benchmark.fixed_batch import longest_sequence
from quatom.benchmark.random_weights import random_model
from quatom.benchmark.roofline import Ceilings
from quatom.benchmark.step_profile import IDLE, REST, charge, part_of, profile_steps
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.errors import EngineError
from quatom.presets import PRESETS


def test_a_kernel_that_waits_for_its_predecessor_is_charged_from_its_end():
    charged = charge(
        [
            ("quantize_groups", 0.0, 4.0),
            ("linear_hopper", 1.0, 10.0),  # launched early: 6 of its 9 are its own
            ("decode", 12.0, 20.0),
            ("Memcpy HtoD", 13.0, 14.0),  # on another stream, hidden
        ]
    )
    assert charged["norm, reorder, quantize"] == 4.0
    assert charged["linears"] == 6.0
    assert (charged["attention"], charged[REST]) == (8.0, 0.0)
    assert charged[IDLE] == 2.0
    assert sum(charged.values()) == 20.0


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("linear_hopper", "linears"),
        ("_norm_quantize_kernel", "norm, reorder, quantize"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("_prefill_kernel", "attention"),
        ("nvjet_sm90_hsh_256x64_64x5_2x1_v_bz_TNT", "matrix products of cuBLAS"),
        ("void at::native::reduce_kernel<512, 1, ...ArgMaxOps", REST),
    ],
)
def test_kernels_belong_to_parts(kernel, part):
    assert part_of(kernel) == part


def test_a_cpu_has_no_steps_to_profile():
    loaded = random_model("tiny", PRESETS["quatom-w4a4kv4"], device="cpu")
    with pytest.raises(EngineError, match="the model is on the CPU"):
        profile_steps(
            loaded,
            model="tiny",
            batches=[2],
            context=8,
            prefill_tokens=16,
            ceilings=Ceilings(3.0, 800.0, 1500.0),
            kv_cache_memory=2**20,
        )


def test_all_sequences_of_a_batch_decode_while_it_is_profiled(monkeypatch):
    """48 prompts of 64 tokens take 48 steps: none may end while the last ones still run."""
    batch, context, steps = 48, 64, 8
    config = EngineConfig(
        max_num_seqs=batch,
        max_num_batched_tokens=128,
        max_model_len=longest_sequence(context, steps, 1),
        kv_cache_memory=2**24,
        prefix_caching=False,
        forecast_admission=False,
    )
    engine = Engine(random_model("tiny", PRESETS["fp16"], device="cpu"), config)
    reached = []

    def run(step, count):
        for _ in range(count):
            step()  # raises unless every sequence gives a token
        reached.extend(s.num_tokens for s in engine.scheduler.running)
        return {}

    monkeypatch.setattr(step_profile, "_profile", run)
    step_profile._profile_decode(engine, batch, context, steps)
    assert len(reached) == batch
    assert abs(sum(reached) / batch - (context + steps / 2)) <= 4
    assert not engine.has_work
    engine.check_accounting()
