"""Hunyuan 3: norms of q and k, corrected experts beside a shared one."""

from quatom.families.corrected import beside_shared, mixed, mlp_layer_types
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What a HYV3ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    # Sums of experts are float32 here in any case.
    keys.ignore("enable_moe_fp32_combine")
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    dense = read_feed_forward(keys)
    scale = keys.positive("router_scaling_factor", default=2.826)
    experts = beside_shared(
        keys,
        sizes.hidden,
        dense.activation,
        Router(scores="sigmoid", normalized=True, scale=scale),
        width=1536,
        counts=("num_experts", "num_local_experts"),
        count=192,
        shared_count="num_shared_experts",
        tensors={
            "weight": ("mlp.gate.weight", "mlp.router.gate.weight"),
            "correction": ("mlp.e_score_correction_bias", "mlp.expert_bias"),
        },
        released="mlp.shared_mlp",
    )
    sparse = mlp_layer_types(keys, sizes.layers, first=1)
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=11_158_840.0),
        family="hy_v3",
        norm=norm,
        feed_forward=mixed(sparse, dense_feed(dense, sizes.hidden), experts),
        qk_norm=norm,
        attention_bias=bias,
        output_bias=bias,
        unused_layers=keys.integer("num_nextn_predict_layers", default=0, least=0),
    )


HY_V3 = Family(
    name="hy_v3",
    architectures=("HYV3ForCausalLM",),
    model_type="hy_v3",
    models="Hunyuan 3",
    read=read,
)
