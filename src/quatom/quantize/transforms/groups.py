"""Rotate the groups of every weight as its input's groups are rotated when they are quantized."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.modeling.weights import FloatLayer, matrices
from quatom.numerics.hadamard import rotate_groups
from quatom.plan import LayerPlan


def rotate_groups_of_inputs(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Columns of every weight rotated within their groups."""
    sites = {}
    for name, held in weights.sites.items():
        rotated = torch.empty_like(held.weight)
        layout = layer.sites[name].layout
        # One expert after another: in float32 all of them would take twice the layer's memory.
        for into, weight in zip(matrices(rotated), matrices(held.weight), strict=True):
            into.copy_(rotate_groups(weight, layout))
        sites[name] = replace(held, weight=rotated)
    return replace(weights, sites=sites)
