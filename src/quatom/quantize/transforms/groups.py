"""Rotate the groups of every weight as its input's groups are rotated when they are quantized."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from quatom.modeling.weights import FloatLayer
from quatom.numerics.hadamard import rotate_groups
from quatom.plan import LayerPlan


def rotate_groups_of_inputs(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Columns of every weight rotated within their groups."""
    sites = {}
    for name, held in weights.sites.items():
        rotated = rotate_groups(held.weight, layer.sites[name].layout)
        sites[name] = replace(held, weight=rotated.to(held.weight.dtype))
    return replace(weights, sites=sites)
