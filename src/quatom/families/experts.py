"""Layers of routed experts, as the files of mixture-of-experts families hold them."""

from collections.abc import Mapping
from dataclasses import replace

from quatom.errors import ModelError
from quatom.families.decoder import Feed, dense_feed, read_feed_forward
from quatom.families.keys import Keys
from quatom.families.sizes import Sizes
from quatom.families.spec import (
    Experts,
    FeedForward,
    Linear,
    Router,
    RouterTensor,
    Spelling,
)

Spellings = Mapping[str, tuple[Spelling, ...]]
"""Other names of "gate_up" and "down" in files, and of "gate_up_bias" and "down_bias" where experts
have biases."""

BY_PROJECTION: Spellings = {
    "gate_up": (
        Spelling(("mlp.experts.gate_up_proj",)),
        Spelling(("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")),
        Spelling(("mlp.experts.gate_up_proj",), transposed=True),
    ),
    "down": (
        Spelling(("mlp.experts.down_proj",)),
        Spelling(("mlp.experts.{}.down_proj.weight",)),
        Spelling(("mlp.experts.down_proj",), transposed=True),
    ),
}
"""Qwen's names: one tensor per expert in files, all experts in one where transformers 5 saves what
it holds in memory, the same transposed in files of Qwen3-VL."""
BY_NUMBER: Spellings = {
    "gate_up": (
        Spelling(("mlp.experts.gate_up_proj",)),
        Spelling(
            ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight")
        ),
    ),
    "down": (
        Spelling(("mlp.experts.down_proj",)),
        Spelling(("block_sparse_moe.experts.{}.w2.weight",)),
    ),
}
"""Mixtral's names: w1 is gate, w3 up, w2 down."""


def expert_feed(
    hidden_size: int,
    *,
    count: int,
    top_k: int,
    feed_forward: FeedForward,
    router: Router,
    tensors: Mapping[RouterTensor, tuple[str, ...]],
    spellings: Spellings = BY_PROJECTION,
    shared: Feed | None = None,
) -> Feed:
    """A layer of routed experts.

    Args:
        hidden_size: of the model.
        count: Experts of the layer.
        top_k: Experts of a token.
        feed_forward: of each expert.
        router: how they are chosen.
        tensors: as in `Experts`.
        spellings: names in files; experts have biases where it has names of them.
        shared: a feed-forward layer that all tokens run through, as `shared_feed` makes it.

    Raises:
        ModelError: the numbers do not fit each other.
    """
    experts = Experts(
        count=count, top_k=top_k, feed_forward=feed_forward, router=router, tensors=tensors
    )

    def joined(name: str, rows: int) -> tuple[Linear, ...]:
        return (
            Linear(
                name=f"mlp.experts.{name}_proj",
                rows=rows,
                bias=f"{name}_bias" in spellings,
                experts=count,
                spellings=spellings[name],
                bias_spellings=spellings.get(f"{name}_bias", ()),
            ),
        )

    return Feed(
        dense=None if shared is None else shared.dense,
        experts=experts,
        linears={
            **({} if shared is None else shared.linears),
            "experts_gate_up": joined("gate_up", feed_forward.made_rows),
            "experts_down": joined("down", hidden_size),
        },
    )


def shared_feed(
    feed_forward: FeedForward, hidden_size: int, prefix: str, released: str | None = None
) -> Feed:
    """A feed-forward layer beside experts.

    Args:
        feed_forward: what it computes.
        hidden_size: of the model.
        prefix: of its tensors within the layer, in this library as in transformers.
        released: their prefix in files, if it is another.
    """

    def linear(name: str, rows: int) -> Linear:
        there = f"{released}.{name}.weight"
        spellings = () if released is None else (Spelling((there,)),)
        return Linear(name=f"{prefix}.{name}", rows=rows, spellings=spellings)

    size = feed_forward.size
    return Feed(
        dense=feed_forward,
        linears={
            "gate_up": (linear("gate_proj", size), linear("up_proj", size)),
            "down": (linear("down_proj", hidden_size),),
        },
    )


def sparse_feeds(
    keys: Keys, sizes: Sizes, *, count: int, top_k: int, width: int, shared: int | None = None
) -> tuple[Feed, ...]:
    """Qwen's layers: experts in some, feed-forward layers of intermediate_size in the others.

    Args:
        keys: of config.json.
        sizes: of the same model.
        count: Experts of a layer.
        top_k: Experts of a token.
        width: of each expert.
        shared: width of a shared expert, which a gate weighs.

    Raises:
        ModelError: a key is wrong, or the numbers do not fit each other.
    """
    dense = read_feed_forward(keys)
    tensors: dict[RouterTensor, tuple[str, ...]] = {"weight": ("mlp.gate.weight",)}
    if shared is not None:
        tensors["shared_gate"] = ("mlp.shared_expert_gate.weight",)
    feed = expert_feed(
        sizes.hidden,
        count=count,
        top_k=top_k,
        feed_forward=replace(dense, size=width),
        router=Router(normalized=keys.flag("norm_topk_prob")),
        tensors=tensors,
        shared=None
        if shared is None
        else shared_feed(replace(dense, size=shared), sizes.hidden, "mlp.shared_expert"),
    )
    plain = dense_feed(dense, sizes.hidden)
    return tuple(feed if sparse else plain for sparse in _sparse_layers(keys, sizes.layers))


def _sparse_layers(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every decoder_sparse_step-th but for mlp_only_layers."""
    step = keys.integer("decoder_sparse_step", default=1)
    dense = keys.value("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in dense
    ):
        raise ModelError(f"config key mlp_only_layers must be a list of layers, got {dense!r}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
