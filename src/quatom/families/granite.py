"""Granite 3 (dense): Llama with four multipliers."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a GraniteForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="granite",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=read_feed_forward(keys),
        scale=keys.positive("attention_multiplier", default=1.0),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        residual_multiplier=keys.number("residual_multiplier", default=1.0),
        embedding_multiplier=keys.number("embedding_multiplier", default=1.0),
        logits_divisor=keys.positive("logits_scaling", default=1.0),
    )


GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    models="Granite 3.0 to 3.3 (dense)",
    read=read,
)
