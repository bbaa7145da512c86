"""EXAONE 3: Llama under other names."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an ExaoneForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    names = {"num_hidden_layers": "num_layers"}
    sizes = read_sizes(keys, max_position=4096, kv_heads=8, spellings=names)
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=500_000.0),
        family="exaone",
        norm=Norm(eps=keys.positive("rms_norm_eps", "layer_norm_epsilon", default=1e-5)),
        feed_forward=read_feed_forward(keys, "hidden_act", "activation_function", default="silu"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        linears={
            "qkv": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
            "o": ("attn.attention.out_proj",),
            "gate_up": ("mlp.c_fc_0", "mlp.c_fc_1"),
            "down": ("mlp.c_proj",),
        },
        norms={"attention": "ln_1", "feed_forward": "ln_2"},
        layer_prefix="transformer.h.",
        embedding_name="transformer.wte.weight",
        final_norm_name="transformer.ln_f",
    )


EXAONE = Family(
    name="exaone",
    architectures=("ExaoneForCausalLM",),
    model_type="exaone",
    saved_as="LlamaForCausalLM",
    models="EXAONE 3.0 and 3.5, EXAONE Deep",
    read=read,
)
