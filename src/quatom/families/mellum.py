"""Mellum 2: Qwen3-MoE with windows in some layers and a rotary embedding per layer type."""

from dataclasses import replace

from quatom.families.corrected import mixed, mlp_layer_types
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import ropes_by_layer_type
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What a MellumForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=4, head_dim=128)
    dense = read_feed_forward(keys)
    experts = expert_feed(
        sizes.hidden,
        count=keys.integer("num_experts", "num_local_experts", default=64),
        top_k=keys.integer("num_experts_per_tok", default=8),
        feed_forward=replace(dense, size=keys.integer("moe_intermediate_size", default=896)),
        router=Router(normalized=keys.flag("norm_topk_prob", default=True)),
        tensors={"weight": ("mlp.gate.weight",)},
    )
    sparse = mlp_layer_types(keys, sizes.layers, first=0)
    types = layer_types(keys, ("full_attention",) * sizes.layers)
    rotary = ropes_by_layer_type(
        keys,
        sizes,
        types,
        theta={"full_attention": 500_000.0, "sliding_attention": 10_000.0},
        theta_names={},
    )
    # Of layers that draft tokens.
    keys.ignore("num_nextn_predict_layers", "num_mtp_layers")
    keys.ignore("mtp_layer_types", "mtp_mlp_layer_types")
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        rotary,
        family="mellum",
        norm=norm,
        feed_forward=mixed(sparse, dense_feed(dense, sizes.hidden), experts),
        windows=windows(types, keys.integer_or_none("sliding_window", default=1024)),
        qk_norm=norm,
        attention_bias=bias,
        output_bias=bias,
        unused_parts=("mtp.",),
    )


MELLUM = Family(
    name="mellum",
    architectures=("MellumForCausalLM",),
    model_type="mellum",
    models="Mellum 2",
    read=read,
)
