"""StarCoder2: LayerNorm, biases everywhere, no gate."""

from quatom.families.decoder import LINEARS, Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Starcoder2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    # Released files keep keys of StarCoder 1. Only hidden_act counts, not activation_function.
    keys.only("activation_function", "gelu", "gelu_pytorch_tanh")
    keys.only("mlp_type", "default")
    sizes = read_sizes(keys, max_position=4096, kv_heads=2)
    bias = keys.flag("use_bias", default=True)
    window = keys.integer_or_none("sliding_window", default=None)
    eps = keys.positive("norm_epsilon", "layer_norm_epsilon", default=1e-5)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="starcoder2",
        norm=Norm(kind="layer", eps=eps, bias=True),
        feed_forward=read_feed_forward(keys, default="gelu_pytorch_tanh", gated=False),
        windows=same_window(keys, sizes.layers, window),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        linears={**LINEARS, "gate_up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
        tied=True,
    )


STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    model_type="starcoder2",
    models="StarCoder2",
    read=read,
)
