"""GPT-NeoX: attention beside the feed-forward layer, each with a LayerNorm of its own."""

from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import fixed_heads, read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a GPTNeoXForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    fixed_heads(keys, sizes)
    bias = keys.flag("attention_bias", default=True)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, partial=0.25, theta_name="rotary_emb_base"),
        family="gpt_neox",
        norm=Norm(kind="layer", eps=keys.positive("layer_norm_eps", default=1e-5), bias=True),
        feed_forward=read_feed_forward(keys, default="gelu", gated=False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        linears={
            "qkv": ("attention.query_key_value",),
            "o": ("attention.dense",),
            "gate_up": ("mlp.dense_h_to_4h",),
            "down": ("mlp.dense_4h_to_h",),
        },
        parallel=keys.flag("use_parallel_residual", default=True),
        rows_by_group=True,
        layer_prefix="gpt_neox.layers.",
        embedding_name="gpt_neox.embed_in.weight",
        final_norm_name="gpt_neox.final_layer_norm",
    )


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    models="Pythia, GPT-NeoX-20B, Dolly v2, StableLM Alpha",
    read=read,
)
