"""ERNIE 4.5 with experts: chosen by corrected softmax scores, beside shared ones."""

from dataclasses import replace

from quatom.families.corrected import mixed
from quatom.families.decoder import Family, decoder, dense_feed, read_feed_forward
from quatom.families.experts import expert_feed, shared_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig, Norm, Router


def read(keys: Keys) -> ModelConfig:
    """What an Ernie4_5_MoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=131_072, kv_heads=4)
    keys.only("moe_gate", "topk")
    keys.only("moe_use_aux_free", True)
    keys.ignore("moe_capacity")  # in training alone
    drafts = keys.integer("num_nextn_predict_layers", default=0, least=0)
    dense = read_feed_forward(keys)
    width = keys.integer("moe_intermediate_size", default=1536)
    shared = width * keys.integer("moe_num_shared_experts", default=2, least=0)
    experts = expert_feed(
        sizes.hidden,
        count=keys.integer("moe_num_experts", "num_experts", default=64),
        top_k=keys.integer("moe_k", "num_experts_per_tok", default=6),
        feed_forward=replace(dense, size=width),
        router=Router(normalized=True, least_sum=keys.positive("moe_norm_min", default=1e-12)),
        tensors={
            "weight": ("mlp.gate.weight",),
            "correction": (
                "mlp.gate.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
                "mlp.moe_statics.e_score_correction_bias",
            ),
        },
        shared=shared_feed(replace(dense, size=shared), sizes.hidden, "mlp.shared_experts")
        if shared
        else None,
    )
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes, theta=500_000.0, interleaved=True),
        family="ernie4_5_moe",
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-5)),
        feed_forward=mixed(
            _sparse_layers(keys, sizes.layers), dense_feed(dense, sizes.hidden), experts
        ),
        tied=True,
        unused_layers=drafts,
        unused_parts=("model.mtp_",),
    )


def _sparse_layers(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every moe_layer_interval-th between two layers."""
    first = keys.integer("moe_layer_start_index", default=1, least=0)
    last = keys.integer("moe_layer_end_index", default=-1, least=-1)
    last = layers - 1 if last == -1 else last
    every = keys.integer("moe_layer_interval", default=1)
    return tuple(first <= layer <= last and (layer + 1) % every == 0 for layer in range(layers))


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    model_type="ernie4_5_moe",
    models="ERNIE-4.5-21B-A3B and 300B-A47B",
    read=read,
)
