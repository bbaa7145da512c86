"""Rewrites of a floating-point layer that leave what it computes unchanged.

Each makes the layer easier to quantize: balanced products, rotated values, balanced keys, scaled
channels, ordered channels or split ones, rotated groups, incoherence. A recipe's list runs in this
order: those of `before`, then the layer is measured on the calibration text, then those of `after`,
which may use what was measured. Splitting merges some channels besides, which changes a little.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from quatom.modeling.weights import FloatLayer
from quatom.plan import LayerPlan
from quatom.quantize.transforms.groups import rotate_groups_of_inputs
from quatom.quantize.transforms.incoherence import rotate_both_sides
from quatom.quantize.transforms.keys import balance_keys, offset_keys
from quatom.quantize.transforms.order import order_channels
from quatom.quantize.transforms.products import balance_products
from quatom.quantize.transforms.scaling import scale_channels
from quatom.quantize.transforms.splitting import split_channels
from quatom.quantize.transforms.values import rotate_values
from quatom.recipe import Recipe

Statistics = Mapping[str, Tensor]
"""Measured on a layer's calibration inputs: see `quatom.quantize.statistics`."""


class Transform(Protocol):
    """Rewrites one layer. It is called with statistics wherever the recipe's text was read."""

    def __call__(self, layer: LayerPlan, weights: FloatLayer, statistics: Statistics) -> FloatLayer:
        """The rewritten weights; nothing is changed in place."""


@dataclass(frozen=True, slots=True)
class TransformList:
    """What a recipe does to a layer before its weights are rounded."""

    before: tuple[Transform, ...]
    """Run before the layer is measured."""
    after: tuple[Transform, ...]
    """Run with the statistics of the layer that `before` left."""

    def prepare(self, layer: LayerPlan, weights: FloatLayer) -> FloatLayer:
        """The layer as it is measured."""
        return _run(self.before, layer, weights, {})

    def finish(
        self, layer: LayerPlan, weights: FloatLayer, statistics: Statistics | None
    ) -> FloatLayer:
        """The layer as it is rounded, from what `prepare` gave."""
        return _run(self.after, layer, weights, statistics or {})


def _run(
    transforms: tuple[Transform, ...],
    layer: LayerPlan,
    weights: FloatLayer,
    statistics: Statistics,
) -> FloatLayer:
    for transform in transforms:
        weights = transform(layer, weights, statistics)
    return weights


def transforms_of(recipe: Recipe) -> TransformList:
    """The transforms that a recipe asks for."""
    cache = recipe.kv_cache
    before: list[Transform] = []
    after: list[Transform] = []
    if recipe.quantizes_weights or recipe.kv_formats != ("float16",):
        before.append(balance_products)
    if cache.value_rotation == "hadamard":
        before.append(rotate_values)
    if cache.key_offset != "none":
        after.append(offset_keys)
    if cache.key_scaling != "none":
        after.append(balance_keys)
    if recipe.channel_scaling is not None:
        after.append(partial(scale_channels, spec=recipe.channel_scaling))
    if recipe.channel_splitting is not None:
        after.append(partial(split_channels, spec=recipe.channel_splitting))
    elif recipe.orders_channels:
        after.append(order_channels)
    if recipe.activations.rotation == "hadamard":
        after.append(rotate_groups_of_inputs)
    if recipe.incoherence is not None:
        after.append(rotate_both_sides)
    return TransformList(tuple(before), tuple(after))
