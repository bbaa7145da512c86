"""K-EXAONE: EXAONE 4's attention with norms before it, corrected experts beside a shared one."""

from quatom.families.corrected import (
    CORRECTED,
    beside_shared,
    corrected_router,
    mixed,
    mlp_layer_types,
)
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.exaone4 import read_attention
from quatom.families.keys import Keys
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm


def read(keys: Keys) -> ModelConfig:
    """What an ExaoneMoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048, kv_heads=32)
    dense = read_feed_forward(keys)
    experts = beside_shared(
        keys,
        sizes.hidden,
        dense.activation,
        corrected_router(keys, scale=2.5),
        width=1024,
        counts=("num_experts",),
        count=64,
        shared_count="num_shared_experts",
        tensors={
            "weight": ("mlp.gate.weight",),
            "correction": (*CORRECTED["correction"], "mlp.e_score_correction_bias"),
        },
    )
    first = keys.integer("first_k_dense_replace", default=1, least=0)
    sparse = mlp_layer_types(keys, sizes.layers, first=first)
    norm = Norm(eps=keys.positive("rms_norm_eps", default=1e-5))
    rotary, windows = read_attention(keys, sizes)
    return decoder(
        keys,
        sizes,
        rotary,
        family="exaone_moe",
        norm=norm,
        feed_forward=mixed(sparse, dense_feed(dense, sizes.hidden), experts),
        windows=windows,
        qk_norm=norm,
        unused_layers=keys.integer("num_nextn_predict_layers", default=0, least=0),
        unused_parts=("mtp.",),
    )


EXAONE_MOE = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    model_type="exaone_moe",
    models="K-EXAONE-236B-A23B",
    read=read,
)
