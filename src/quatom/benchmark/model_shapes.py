"""Sizes of public models by name: what benchmarks run without a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace

from quatom.errors import ModelError
from quatom.modeling.config import ModelConfig

_LLAMA_2 = ModelConfig(
    architecture="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)

SHAPES: Mapping[str, ModelConfig] = {
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": replace(
        _LLAMA_2,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
    ),
    "llama-2-70b": replace(
        _LLAMA_2,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
    "llama-3-8b": replace(
        _LLAMA_2,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        rope_theta=500000.0,
        max_position=8192,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    "tiny": replace(
        _LLAMA_2,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position=512,
    ),
}
"""Sizes by name: the public models' own, and "tiny" for tests."""


def find_shape(name: str) -> ModelConfig:
    """The sizes called `name`.

    Raises:
        ModelError: there are none.
    """
    if name not in SHAPES:
        raise ModelError(f"unknown model shape {name!r}; known are {', '.join(SHAPES)}")
    return SHAPES[name]
