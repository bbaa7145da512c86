"""Granite 3: Llama with four multipliers."""

from collections.abc import Sequence
from typing import Any

from quatom.families.decoder import Family, Feed, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a GraniteForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    bias = keys.flag("mlp_bias")
    return read_granite(keys, sizes, "granite", read_feed_forward(keys), mlp_bias=bias)


def multipliers(keys: Keys) -> dict[str, Any]:
    """Granite's, as arguments of `decoder`.

    Raises:
        ModelError: one is no number, or one that must be positive is not.
    """
    return {
        "scale": keys.positive("attention_multiplier", default=1.0),
        "residual_multiplier": keys.number("residual_multiplier", default=1.0),
        "embedding_multiplier": keys.number("embedding_multiplier", default=1.0),
        "logits_divisor": keys.positive("logits_scaling", default=1.0),
    }


def read_granite(
    keys: Keys,
    sizes: Sizes,
    family: str,
    feed_forward: FeedForward | Sequence[Feed],
    *,
    mlp_bias: bool = False,
) -> ModelConfig:
    """A decoder with Granite's multipliers.

    Raises:
        ModelError: a key is missing or not supported.
    """
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family=family,
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=feed_forward,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        **multipliers(keys),
    )


GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    models="Granite 3.0 to 3.3 (dense)",
    read=read,
)
