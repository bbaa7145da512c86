"""Granite 3 with experts in every layer, alone or beside a feed-forward layer for all tokens."""

from dataclasses import replace

from quatom.families.decoder import Family, Feed, dense_feed, read_feed_forward
from quatom.families.experts import expert_feed
from quatom.families.granite import read_granite
from quatom.families.keys import Keys
from quatom.families.sizes import Sizes, read_sizes
from quatom.families.spec import FeedForward, ModelConfig, Router, Spelling


def read(keys: Keys) -> ModelConfig:
    """What a GraniteMoeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    feed = _feed(keys, sizes, read_feed_forward(keys), None)
    return read_granite(keys, sizes, "granitemoe", (feed,) * sizes.layers)


def read_shared(keys: Keys) -> ModelConfig:
    """What a GraniteMoeSharedForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported.
    """
    sizes = read_sizes(keys, max_position=2048)
    return read_granite(keys, sizes, "granitemoeshared", shared_feeds(keys, sizes))


def shared_feeds(keys: Keys, sizes: Sizes) -> tuple[Feed, ...]:
    """Experts of every layer, beside a feed-forward layer if shared_intermediate_size is not 0.

    Raises:
        ModelError: a key is missing or not supported.
    """
    own = read_feed_forward(keys)
    shared = None
    if size := keys.integer("shared_intermediate_size", default=0, least=0):
        shared = dense_feed(
            replace(own, size=size),
            sizes.hidden,
            {"gate_up": ("shared_mlp.input_linear",), "down": ("shared_mlp.output_linear",)},
        )
    return (_feed(keys, sizes, own, shared),) * sizes.layers


def _feed(keys: Keys, sizes: Sizes, feed_forward: FeedForward, shared: Feed | None) -> Feed:
    return expert_feed(
        sizes.hidden,
        count=keys.integer("num_local_experts", default=8),
        top_k=keys.integer("num_experts_per_tok", default=2),
        feed_forward=feed_forward,
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
        shared=shared,
    )


GRANITE_MOE = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    models="Granite 3.0 and 3.1 1B-A400M and 3B-A800M",
    read=read,
)
GRANITE_MOE_SHARED = Family(
    name="granitemoeshared",
    architectures=("GraniteMoeSharedForCausalLM",),
    model_type="granitemoeshared",
    models="Granite with experts and a shared expert",
    read=read_shared,
)
