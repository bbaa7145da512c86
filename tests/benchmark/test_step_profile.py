"""Charging time to the parts of a step."""

import pytest

from quatom.benchmark.random_weights import random_model
from quatom.benchmark.roofline import Ceilings
from quatom.benchmark.step_profile import IDLE, REST, charge, part_of, profile_steps
from quatom.errors import EngineError
from quatom.recipe import PRESETS


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
        ("_rmsnorm_quantize_kernel", "norm, reorder, quantize"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
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
