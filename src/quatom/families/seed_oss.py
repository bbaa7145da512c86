"""Seed-OSS: Llama with biases of q, k and v, and a bias of o of its own."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a SeedOssForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=524_288, kv_heads=8, head_dim=128)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="seed_oss",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=read_feed_forward(keys),
        attention_bias=keys.flag("attention_bias", default=True),
        output_bias=keys.flag("attention_out_bias"),
        mlp_bias=keys.flag("mlp_bias"),
    )


SEED_OSS = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    model_type="seed_oss",
    models="Seed-OSS",
    read=read,
)
