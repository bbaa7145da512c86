"""Qwen3-MoE: Qwen3 with experts in some layers."""

from quatom.families.decoder import Family, decoder
from quatom.families.experts import sparse_feeds
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes, same_window
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a Qwen3MoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=32_768, kv_heads=4)
    window = keys.integer_or_none("sliding_window", default=4096)
    if not keys.flag("use_sliding_window"):
        window = None
    bias = keys.flag("attention_bias")
    # What Qwen3-Coder says besides.
    keys.only("shared_expert_intermediate_size", 0)
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family="qwen3_moe",
        norm=norm,
        feed_forward=sparse_feeds(
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


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    read=read,
)
