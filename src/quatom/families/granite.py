"""Granite 3: Llama with four multipliers, dense or with experts in every layer."""

from collections.abc import Sequence

from quatom.families.decoder import Family, Feed, decoder, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.keys import Keys
from quatom.families.rope import one_rope
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Norm, Router, Spelling


def read(keys: Keys) -> ModelConfig:
    """What a GraniteForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    bias = keys.flag("mlp_bias")
    return _read(keys, sizes, "granite", read_feed_forward(keys), mlp_bias=bias)


def read_moe(keys: Keys) -> ModelConfig:
    """What a GraniteMoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    feed = expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", default=8),
        top_k=keys.integer("num_experts_per_tok", default=2),
        feed_forward=read_feed_forward(keys),
        router=Router(normalized=True),
        tensors={
            "weight": (
                "mlp.gate.weight",
                "block_sparse_moe.router.layer.weight",
                "block_sparse_moe.router.weight",
            )
        },
        spellings={
            "gate_up": (
                Spelling(("block_sparse_moe.input_linear.weight",)),
                Spelling(("block_sparse_moe.experts.gate_up_proj",)),
            ),
            "down": (
                Spelling(("block_sparse_moe.output_linear.weight",)),
                Spelling(("block_sparse_moe.experts.down_proj",)),
            ),
        },
    )
    return _read(keys, sizes, "granitemoe", (feed,) * sizes.layers)


def _read(
    keys: Keys,
    sizes: Sizes,
    family: str,
    feed_forward: FeedForward | Sequence[Feed],
    *,
    mlp_bias: bool = False,
) -> ModelConfig:
    bias = keys.flag("attention_bias")
    return decoder(
        keys,
        sizes,
        one_rope(keys, sizes),
        family=family,
        norm=Norm(eps=keys.positive("rms_norm_eps", default=1e-6)),
        feed_forward=feed_forward,
        scale=keys.positive("attention_multiplier", default=1.0),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        residual_multiplier=keys.number("residual_multiplier", default=1.0),
        embedding_multiplier=keys.number("embedding_multiplier", default=1.0),
        logits_divisor=keys.positive("logits_scaling", default=1.0),
    )


GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    models="Granite 3.0 to 3.3 (dense)",
    read=read,
)
GRANITE_MOE = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    models="Granite 3.0 and 3.1 1B-A400M and 3B-A800M",
    read=read_moe,
)
