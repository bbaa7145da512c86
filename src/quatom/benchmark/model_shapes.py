"""Sizes of public models by name: what benchmarks run without a checkpoint."""

from collections.abc import Mapping
from typing import Any

from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.families.spec import ModelConfig

_LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": _LLAMA_2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama-2-70b": _LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": _LLAMA_2
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "tiny": _LLAMA_2
    | {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    },
}
"""config.json by name: the public models' own, and "tiny" for tests."""


def find_shape(name: str) -> ModelConfig:
    """The model called `name`.

    Raises:
        ModelError: there is none.
    """
    if name not in SHAPES:
        raise ModelError(f"unknown model shape {name!r}; known are {', '.join(SHAPES)}")
    return read_config(SHAPES[name])
