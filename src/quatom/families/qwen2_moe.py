"""Qwen2-MoE: experts in some layers, beside a shared expert with a gate of its own."""

from quatom.families.decoder import Family, decoder
from quatom.families.experts import sparse_feeds
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import layer_types, read_sizes, windows
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
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
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen2_moe",
        norm=norm,
        feed_forward=sparse_feeds(
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


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    read=read,
)
