"""Gemma 2: norms of 1 + w before and after, soft-caps, a window in every second layer."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.gemma import gemma_norm
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, periodic_layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, NormName

_NORMS: Mapping[NormName, str] = {
    "attention": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "feed_forward": "pre_feedforward_layernorm",
    "feed_forward_output": "post_feedforward_layernorm",
}


def read(keys: Keys) -> ModelConfig:
    """What a Gemma2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    return alternating(keys, family="gemma2")


def alternating(keys: Keys, *, family: str, norms: Mapping[NormName, str] = _NORMS) -> ModelConfig:
    """A Gemma with soft-caps and a window in every second layer.

    Args:
        keys: of config.json.
        family: Name in the registry.
        norms: Names of the norms of a layer.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192, kv_heads=4, head_dim=256)
    return gemma(
        keys,
        sizes,
        one_rope(keys, sizes),
        periodic_layer_types(keys, sizes.layers, every=2),
        family=family,
        norms=norms,
        score_softcap=keys.number_or_none("attn_logit_softcapping", default=50.0),
        logit_softcap=keys.number_or_none("final_logit_softcapping", default=30.0),
    )


def gemma(
    keys: Keys,
    sizes: Sizes,
    rotary: Rotary,
    types: tuple[str, ...],
    *,
    norms: Mapping[NormName, str] = _NORMS,
    **own: Any,
) -> ModelConfig:
    """What Gemma 2 and its successors share; `own` are arguments of `decoder`."""
    window = keys.integer_or_none("sliding_window", default=4096)
    keys.only("sliding_window_size", window)
    keys.only("hidden_act", "gelu", "gelu_pytorch_tanh")  # only hidden_activation counts
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        rotary,
        norm=gemma_norm(keys),
        feed_forward=read_feed_forward(keys, "hidden_activation", default="gelu_pytorch_tanh"),
        windows=windows(types, window),
        scale=keys.positive("query_pre_attn_scalar", default=256.0) ** -0.5,
        attention_bias=bias,
        output_bias=bias,
        norms=norms,
        tied=True,
        embedding_multiplier=sqrt(sizes.hidden),
        **own,
    )


GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    models="Gemma 2",
    read=read,
)
