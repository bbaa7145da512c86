"""Falcon: attention beside the feed-forward layer, q, k and v in one linear, by KV head."""

from collections.abc import Mapping
from dataclasses import replace

from quatom.families.decoder import NORMS_BEFORE, Family, activation, decoder
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm, NormName

_SPELLINGS = {
    "hidden_size": "n_embed",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(keys: Keys) -> ModelConfig:
    """What a FalconForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; attention biases by distance (alibi) are not.
    """
    keys.only("alibi", False)
    keys.only("rotary", True)
    keys.only("ff_factor", 4)
    keys.only("apply_residual_connection_post_layernorm", False)
    sizes = read_sizes(keys, max_position=2048, spellings=_SPELLINGS)
    grouped = keys.flag("new_decoder_architecture")
    several = keys.integer_or_none("num_kv_heads", default=None) or sizes.heads
    one = keys.flag("multi_query", default=True)
    sizes = replace(sizes, kv_heads=several if grouped else 1 if one else sizes.heads)
    parallel = keys.flag("parallel_attn", default=True) or grouped
    bias = keys.flag("bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="falcon",
        norm=Norm(kind="layer", eps=keys.positive("layer_norm_epsilon", default=1e-5), bias=True),
        feed_forward=FeedForward(
            size=keys.integer_or_none("ffn_hidden_size", default=None) or 4 * sizes.hidden,
            activation=activation(keys, "activation", default="gelu"),
            gated=False,
        ),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        linears={
            "qkv": ("self_attention.query_key_value",),
            "o": ("self_attention.dense",),
            "gate_up": ("mlp.dense_h_to_4h",),
            "down": ("mlp.dense_4h_to_h",),
        },
        norms=_norms(keys, grouped=grouped, parallel=parallel),
        parallel=parallel,
        rows_by_group=True,
        tied=True,
        layer_prefix="transformer.h.",
        embedding_name="transformer.word_embeddings.weight",
        final_norm_name="transformer.ln_f",
    )


def _norms(keys: Keys, *, grouped: bool, parallel: bool) -> Mapping[NormName, str]:
    count = keys.integer_or_none("num_ln_in_parallel_attn", default=None) or 1 + grouped
    if not parallel:
        return NORMS_BEFORE
    if grouped and count == 2:
        return {"attention": "ln_attn", "feed_forward": "ln_mlp"}
    keys.only("num_ln_in_parallel_attn", 1)
    return {"attention": NORMS_BEFORE["attention"]}


FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    models="Falcon 7B, 40B and 180B, Falcon 2 11B",
    read=read,
)
