"""Qwen2-MoE (a shared expert with a gate of its own) and Qwen3-MoE (norms of q and k)."""

from quatom.families.decoder import Family, Feed, decoder, dense_feed, read_feed_forward
from quatom.families.experts import expert_feed, mixed, narrow, sparse_layers
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import Sizes, layer_types, read_sizes, same_window, windows
from quatom.families.spec import ModelConfig, Norm, Router

_ROUTER = ("mlp.gate.weight",)
_SHARED_GATE = ("mlp.shared_expert_gate.weight",)


def read_qwen2(keys: Keys) -> ModelConfig:
    """What a Qwen2MoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=16)
    window = keys.integer("sliding_window", default=4096, least=0) or None
    if not keys.flag("use_sliding_window"):
        window = None
    full = keys.integer("max_window_layers", default=28, least=0)
    default = [
        "sliding_attention"
        if window is not None and layer % 2 == 0 and layer < full
        else "full_attention"
        for layer in range(sizes.layers)
    ]
    norm = _norm(keys)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen2_moe",
        norm=norm,
        feed_forward=_feeds(
            keys,
            sizes,
            count=keys.integer("num_experts", "num_local_experts", default=60),
            top_k=keys.integer("num_experts_per_tok", default=4),
            width=keys.integer("moe_intermediate_size", default=1408),
            shared=keys.integer("shared_expert_intermediate_size", default=5632),
        ),
        windows=windows(layer_types(keys, default), window),
        attention_bias=keys.flag("qkv_bias", default=True),
    )


def read_qwen3(keys: Keys) -> ModelConfig:
    """What a Qwen3MoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=4)
    window = keys.integer_or_none("sliding_window", default=4096)
    if not keys.flag("use_sliding_window"):
        window = None
    bias, norm = keys.flag("attention_bias"), _norm(keys)
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen3_moe",
        norm=norm,
        feed_forward=_feeds(
            keys,
            sizes,
            count=keys.integer("num_experts", "num_local_experts", default=128),
            top_k=keys.integer("num_experts_per_tok", default=8),
            width=keys.integer("moe_intermediate_size", default=768),
        ),
        windows=same_window(keys, sizes.layers, window),
        qk_norm=norm,
        attention_bias=bias,
        output_bias=bias,
    )


def _feeds(
    keys: Keys, sizes: Sizes, *, count: int, top_k: int, width: int, shared: int | None = None
) -> tuple[Feed, ...]:
    """Experts of `width` in some layers, dense layers of intermediate_size in the others."""
    dense = read_feed_forward(keys)
    feed = expert_feed(
        sizes.hidden,
        count=count,
        top_k=top_k,
        feed_forward=narrow(dense, width),
        router=Router(normalized=keys.flag("norm_topk_prob")),
        tensors={"weight": _ROUTER}
        if shared is None
        else {"weight": _ROUTER, "shared_gate": _SHARED_GATE},
        shared=None if shared is None else narrow(dense, shared),
    )
    return mixed(sparse_layers(keys, sizes.layers), feed, dense_feed(dense, sizes.hidden))


def _norm(keys: Keys) -> Norm:
    return Norm(eps=keys.positive("rms_norm_eps", default=1e-6))


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    read=read_qwen2,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    read=read_qwen3,
)
