"""MiniMax-M2: corrected experts; norms over all heads of q and k, half of whose channels turn."""

from quatom.errors import ModelError
from quatom.families.corrected import corrected_router
from quatom.families.decoder import Family, decoder, read_feed_forward
from quatom.families.experts import BY_NUMBER, expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import Rotary, one_rope
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What a MiniMaxM2ForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=196_608, kv_heads=8, head_dim=128)
    _check_released_keys(keys, sizes.layers)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", "num_experts", default=256),
        top_k=keys.integer("num_experts_per_tok", default=8),
        feed_forward=read_feed_forward(keys),
        router=corrected_router(keys),
        tensors={
            "weight": ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
            "correction": (
                "mlp.e_score_correction_bias",
                "block_sparse_moe.e_score_correction_bias",
            ),
        },
        spellings=BY_NUMBER,
    )
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-6))
    return decoder(
        keys,
        sizes,
        _rotary(keys, sizes),
        family="minimax_m2",
        norm=norm,
        feed_forward=(feed,) * sizes.layers,
        qk_norm=norm,
        qk_norm_axis="all",
    )


def _rotary(keys: Keys, sizes: Sizes) -> Rotary:
    """Released files say how many channels turn, transformers 5 which fraction of them."""
    turning = keys.integer("rotary_dim", default=sizes.head_dim)
    rotary = one_rope(keys, sizes, theta=5e6, partial=turning / sizes.head_dim)
    rope = rotary.ropes[0]
    if rope is not None and keys.value("rotary_dim") not in (None, rope.dim):
        raise ModelError(
            f"config keys {keys.show('rotary_dim')} and partial_rotary_factor contradict each "
            f"other: by the second {rope.dim} channels turn; keep the one that is right"
        )
    return rotary


def _check_released_keys(keys: Keys, layers: int) -> None:
    """What released files say of variants that transformers' class is not."""
    keys.per_layer("attn_type_list", layers, 1)
    keys.only("qk_norm_type", "per_layer")
    keys.only("use_routing_bias", True)
    keys.only("norm_topk_prob", True)
    keys.only("shared_intermediate_size", 0)
    keys.ignore("shared_moe_mode")  # of the shared expert, which there is none
    for name in ("n_group", "topk_group", "routed_scaling_factor"):
        keys.only(name, 1)
    for part in ("full_attention", "linear_attention", "mlp"):
        keys.only(f"layernorm_{part}_beta", 1.0)
    # In training alone; of dense layers, which there are none; of layers that draft tokens.
    keys.ignore("router_jitter_noise", "mlp_intermediate_size")
    keys.ignore("num_mtp_modules", "mtp_transformer_layers")


MINIMAX_M2 = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    model_type="minimax_m2",
    models="MiniMax-M2, M2.1 and M2.5",
    read=read,
)
