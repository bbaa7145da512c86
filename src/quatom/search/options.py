"""What may be raised above a base recipe: places, formats, and what each costs in bits.

There are three averages, as `quatom inspect` shows them: stored bits per weight of the decoder
linears, bits per input channel of them, and bits per cached number; scales are counted. The
budget is for the mean of the averages of those kinds that may be raised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from quatom.checkpoint.schema import cached_bits, cached_numbers, input_bits, linear_bits
from quatom.errors import RecipeError
from quatom.families.spec import SiteName
from quatom.plan import LayerPlan, ModelPlan, plan_layer
from quatom.recipe_overrides import (
    ActivationChange,
    KVChange,
    OutlierChange,
    Override,
    WeightChange,
)

Kind = Literal["weights", "activations", "kv_cache"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_OUTLIERS = 128
"""Channels of the widest outlier group that every kernel reads."""

Bits = dict[Kind, Fraction]
"""Of each kind."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to raise a place."""

    name: str
    """In words: "activations int8"."""
    override: Override
    layer: LayerPlan
    """The layer with this alone raised."""
    cost: Fraction
    """What it adds to the mean of the averages."""


@dataclass(frozen=True, slots=True)
class Place:
    """A site of a layer, or its KV cache, and the ways to raise it."""

    layer: int
    site: SiteName | None
    """None: the KV cache."""
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        """The site, or kv_cache."""
        return self.site or "kv_cache"


def read_kinds(words: str) -> tuple[Kind, ...]:
    """Kinds from their names, separated by commas.

    Raises:
        RecipeError: one is no kind.
    """
    names = [word.strip() for word in words.split(",")]
    if unknown := [name for name in names if name not in KINDS]:
        raise RecipeError(
            f"--raise takes {', '.join(KINDS)}, separated by commas, got {unknown[0]!r}"
        )
    return tuple(kind for kind in KINDS if kind in names)


def totals(layers: Sequence[LayerPlan]) -> Bits:
    """Bits of all weights, of all inputs of one token, and of its cached numbers."""
    sites = [site for layer in layers for site in layer.sites.values()]
    return {
        "weights": Fraction(sum(linear_bits(site, lin) for site in sites for lin in site.linears)),
        "activations": Fraction(sum(map(input_bits, sites))),
        "kv_cache": Fraction(sum(map(cached_bits, layers))),
    }


def averages(resolved: ModelPlan) -> Bits:
    """Bits per weight, per input channel and per cached number."""
    found, elements = totals(resolved.layers), _elements(resolved)
    return {kind: found[kind] / elements[kind] for kind in KINDS}


def mean_bits(resolved: ModelPlan, kinds: Sequence[Kind]) -> Fraction:
    """The mean of the averages of some kinds."""
    found = averages(resolved)
    return sum((found[kind] for kind in kinds), Fraction(0)) / len(kinds)


def places_of(
    resolved: ModelPlan, kinds: Sequence[Kind], *, outliers: bool = False
) -> tuple[Place, ...]:
    """Every place that can be raised, each with its options.

    Args:
        resolved: the base.
        kinds: what may be raised.
        outliers: whether twice as many outlier channels are an option, too.

    Raises:
        RecipeError: there is none.
    """
    elements = _elements(resolved)
    places = []
    for layer in resolved.layers:
        before = totals([layer])
        spots: list[SiteName | None] = [*layer.sites, None]
        for site in spots:
            options = []
            for name, override in _raises(layer, site, kinds, outliers):
                try:
                    recipe = replace(resolved.recipe, overrides=(override,))
                    raised = plan_layer(resolved.config, recipe, layer.index)
                except RecipeError:
                    continue  # more outliers than the input has room for
                after = totals([raised])
                added = ((after[kind] - before[kind]) / elements[kind] for kind in kinds)
                cost = sum(added, Fraction(0)) / len(kinds)
                options.append(Option(name, override, raised, cost))
            if options:
                places.append(Place(layer.index, site, tuple(options)))
    if not places:
        raise RecipeError(
            f"recipe {resolved.recipe.name} leaves nothing to raise in {', '.join(kinds)}: weights "
            "and activations of int2 to int7 and caches of int4 can become int8; choose another "
            "--base or --raise"
        )
    return tuple(places)


def _elements(resolved: ModelPlan) -> dict[Kind, int]:
    return {
        "weights": resolved.num_weights,
        "activations": sum(site.channels for site in resolved.sites()),
        "kv_cache": sum(map(cached_numbers, resolved.layers)),
    }


def _raises(
    layer: LayerPlan, site: SiteName | None, kinds: Sequence[Kind], outliers: bool
) -> list[tuple[str, Override]]:
    """Names and overrides of what may be tried at a place."""
    where = str(layer.index)
    if site is None:
        if "kv_cache" not in kinds or layer.kv_cache.format != "int4":
            return []
        return [("KV cache int8", Override(layers=where, kv_cache=KVChange(format="int8")))]
    own, found = layer.sites[site], []
    weights = activations = None
    if "weights" in kinds and _narrow(own.weights.format):
        scales: Literal["float16"] | None = None
        if own.weights.scale_format != "float16":
            scales = "float16"
        weights = WeightChange(format="int8", scale_format=scales)
        found.append(("weights int8", Override(layers=where, sites=(site,), weights=weights)))
    if "activations" in kinds and _narrow(own.activations.format):
        activations = _wide_activations(own.activations.scale_format == "multiples")
        override = Override(layers=where, sites=(site,), activations=activations)
        found.append(("activations int8", override))
    if weights is not None and activations is not None:
        override = Override(layers=where, sites=(site,), weights=weights, activations=activations)
        found.append(("weights and activations int8", override))
    touched = {"weights"} if own.input_spec is None else {"weights", "activations"}
    twice = 2 * own.block_outliers
    if outliers and touched <= set(kinds) and 0 < twice <= MOST_OUTLIERS:
        more = OutlierChange(channels=twice, max_fraction=1.0)
        override = Override(layers=where, sites=(site,), outliers=more)
        found.append((f"{twice} outliers", override))
    return found


def _narrow(form: str) -> bool:
    return form.startswith("int") and form != "int8"


def _wide_activations(multiples: bool) -> ActivationChange:
    """INT8 as the fastest kernels read it beside the weights: see `quatom.ops.linear`."""
    if multiples:
        return ActivationChange(
            format="int8", group_size=-1, scale_format="float16", clip_ratio=1.0
        )
    return ActivationChange(format="int8", clip_ratio=1.0)
