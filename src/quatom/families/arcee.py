"""Arcee: Llama with a feed-forward layer of squared ReLU without a gate."""

from quatom.families.decoder import LINEARS, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an ArceeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="arcee",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=read_feed_forward(keys, default="relu2", gated=False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        linears={**LINEARS, "gate_up": ("mlp.up_proj",)},
    )


ARCEE = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    model_type="arcee",
    models="AFM-4.5B",
    read=read,
)
