"""The first OLMo: Llama with LayerNorm that has neither weight nor bias."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an OlmoForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; queries, keys and values that are clamped
            (clip_qkv) are not.
    """
    keys.only("clip_qkv")
    sizes = read_sizes(keys, max_position=2048)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="olmo",
        norm=Norm(kind="layer", eps=1e-5, implicit=True),
        feed_forward=read_feed_forward(keys),
        attention_bias=bias,
        output_bias=bias,
    )


OLMO = Family(
    name="olmo",
    architectures=("OlmoForCausalLM",),
    model_type="olmo",
    models="OLMo 1B and 7B, but for those with clip_qkv",
    read=read,
)
