"""Nemotron-4 and Minitron: LayerNorm of 1 + w, half of each head turns, squared ReLU, no gate."""

from quatom.families.decoder import LINEARS, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a NemotronForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=4096)
    bias = keys.flag("attention_bias")
    eps = keys.positive("norm_eps", default=1e-5)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.5),
        family="nemotron",
        norm=Norm(kind="layer", eps=eps, weight_offset=1.0, bias=True),
        feed_forward=read_feed_forward(keys, default="relu2", gated=False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        linears={**LINEARS, "gate_up": ("mlp.up_proj",)},
    )


NEMOTRON = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    model_type="nemotron",
    models="Minitron 4B and 8B, Nemotron-4, Nemotron-Mini",
    read=read,
)
