"""Experts chosen by corrected sigmoids beside a shared expert, as many families hold them."""

from collections.abc import Mapping, Sequence

from quatom.families.decoder import Feed
from quatom.families.experts import expert_feed, shared_feed
from quatom.families.keys import Keys
from quatom.families.spec import Activation, FeedForward, Router, RouterTensor

CORRECTED: Mapping[RouterTensor, tuple[str, ...]] = {
    "weight": ("mlp.gate.weight",),
    "correction": ("mlp.gate.e_score_correction_bias",),
}
"""DeepSeek's names, which most families have."""


def corrected_router(
    keys: Keys, *, normalized: bool = True, scale: float = 1.0, groups: bool = True
) -> Router:
    """A router of sigmoid scores.

    Args:
        keys: of config.json.
        normalized: Default of norm_topk_prob.
        scale: Default of routed_scaling_factor.
        groups: The family may cut its experts into groups.

    Raises:
        ModelError: config.json says that experts are chosen in another way.
    """
    keys.only("scoring_func", "sigmoid", "noaux_tc")  # dots.llm1 says the method here
    keys.only("topk_method", "noaux_tc")
    keys.only("moe_layer_freq", 1)
    return Router(
        scores="sigmoid",
        normalized=keys.flag("norm_topk_prob", default=normalized),
        scale=keys.positive("routed_scaling_factor", default=scale),
        groups=keys.integer("n_group", default=1) if groups else 1,
        top_groups=keys.integer("topk_group", default=1) if groups else 1,
    )


def beside_shared(
    keys: Keys,
    hidden_size: int,
    activation: Activation,
    router: Router,
    *,
    width: int,
    counts: tuple[str, ...] = ("n_routed_experts", "num_local_experts"),
    count: int | None,
    top_k: int | None = 8,
    shared_count: str = "n_shared_experts",
    shared: int | None = 1,
    tensors: Mapping[RouterTensor, tuple[str, ...]] = CORRECTED,
    released: str | None = None,
) -> Feed:
    """Routed experts, and a shared one that is as wide as several of them.

    Args:
        keys: of config.json.
        hidden_size: of the model.
        activation: of every expert; all have gates.
        router: how experts are chosen.
        width: Default of moe_intermediate_size.
        counts: Names of the key of the number of routed experts.
        count: Its default; None: it is required.
        top_k: Default of num_experts_per_tok; None: it is required.
        shared_count: Key that says how many routed experts the shared one is as wide as.
        shared: Its default; None: it is required.
        tensors: As in `expert_feed`.
        released: Prefix of the shared expert's tensors in files, if it is another than here.

    Raises:
        ModelError: a key is missing or wrong.
    """
    size = keys.integer("moe_intermediate_size", default=width)
    wide = size * keys.integer(shared_count, default=shared)
    return expert_feed(
        hidden_size,
        count=keys.integer(*counts, default=count),
        top_k=keys.integer("num_experts_per_tok", default=top_k),
        feed_forward=FeedForward(size=size, activation=activation),
        router=router,
        tensors=tensors,
        shared=shared_feed(
            FeedForward(size=wide, activation=activation),
            hidden_size,
            "mlp.shared_experts",
            released,
        ),
    )


def sparse_from(layers: int, first: int) -> tuple[bool, ...]:
    """Whether each layer has experts: all from layer `first` on."""
    return tuple(layer >= first for layer in range(layers))


def mlp_layer_types(keys: Keys, layers: int, *, first: int) -> tuple[bool, ...]:
    """Whether each layer has experts: what mlp_layer_types says, or all from layer `first` on.

    Raises:
        ModelError: it is no list of dense and sparse, one per layer.
    """
    types = keys.per_layer("mlp_layer_types", layers, "dense", "sparse")
    if types is None:
        return sparse_from(layers, first)
    return tuple(kind == "sparse" for kind in types)


def mixed(sparse: Sequence[bool], dense: Feed, experts: Feed) -> tuple[Feed, ...]:
    """What follows attention in each layer."""
    return tuple(experts if has else dense for has in sparse)
