"""Rotary tables: by hand, and against transformers' own initialisation."""

import math

import pytest
import torch

from quatom.modeling.config import ModelConfig
from quatom.modeling.rope import inverse_frequencies, rotary_table
from tests.conftest import LLAMA, LLAMA3_SCALING

SCALINGS = {
    "none": None,
    "llama3": LLAMA3_SCALING,
    "llama3 as published": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
}


def config_of(scaling, theta=10000.0):
    extra = {} if scaling is None else {"rope_scaling": scaling}
    return ModelConfig.from_hf(LLAMA | {"rope_theta": theta} | extra)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(name, theta):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    rope = {"rope_type": "default"} if scaling is None else scaling
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=512,
            rope_parameters=rope | {"rope_theta": theta},
        )
    )
    got = inverse_frequencies(config_of(scaling, theta))
    # The same float32 formula in another order: a few ulps.
    torch.testing.assert_close(got, theirs.inv_freq, rtol=1e-6, atol=0)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain = inverse_frequencies(config_of(None))
    scaled = inverse_frequencies(config_of(LLAMA3_SCALING))
    waves = 2 * math.pi / plain
    short, long = waves < 64 / 4, waves > 64 / 1
    assert short.any()
    assert long.any()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_the_table_is_cos_and_sin_of_position_times_frequency():
    cos, sin = rotary_table(config_of(None), 100)
    assert cos.shape == sin.shape == (100, 32)
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    for position, pair in [(0, 0), (1, 0), (99, 0), (7, 5), (99, 31)]:
        angle = position * 10000.0 ** (-2 * pair / 64)
        # float32 angles up to 99 are wrong by 99 * 2**-24.
        assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=2e-5)
        assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=2e-5)
