"""Jais 2: LayerNorm, biases, squared ReLU without a gate."""

from quatom.families.decoder import LINEARS, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Jais2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=8192)
    bias = keys.flag("attention_bias", default=True)
    eps = keys.positive("layer_norm_eps", default=1e-5)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="jais2",
        norm=Norm(kind="layer", eps=eps, bias=True),
        feed_forward=read_feed_forward(keys, default="relu2", gated=False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", default=True),
        linears={**LINEARS, "gate_up": ("mlp.up_proj",)},
    )


JAIS2 = Family(
    name="jais2",
    architectures=("Jais2ForCausalLM",),
    model_type="jais2",
    models="Jais 2 8B and 70B",
    read=read,
)
