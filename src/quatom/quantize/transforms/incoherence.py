"""Rotate inputs and outputs of every linear, so that no weight is much larger than the others.

W becomes U W V^T. A block multiplies the input of a site by V (`InputQuantizer`) and the output of
each of its linears by U^T (`RotatedLinear`): nothing before or after it is linear enough to take
them.

Source: QuIP (Chee et al., NeurIPS 2023).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.modeling.rotated import input_rotation, output_rotations
from quatom.modeling.weights import FloatLayer, FloatSite, matrices
from quatom.numerics.incoherence import Rotation
from quatom.plan import LayerPlan


def rotate_both_sides(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Columns of every weight rotated as its input will be, rows of each linear on their own."""
    sites = {}
    for name, held in weights.sites.items():
        plan, device = layer.sites[name], held.weight.device
        inputs, outputs = input_rotation(plan, device), output_rotations(plan, device)
        assert inputs is not None
        sites[name] = _rotated(held, inputs, outputs)
    return replace(weights, sites=sites)


def _rotated(held: FloatSite, inputs: Rotation, outputs: tuple[Rotation, ...]) -> FloatSite:
    sizes = [rotation.signs.numel() for rotation in outputs]

    def rotate_rows(x: Tensor) -> Tensor:  # (..., N) float32
        parts = zip(outputs, x.split(sizes, dim=-1), strict=True)
        return torch.cat([rotation.apply(part) for rotation, part in parts], dim=-1)

    weight = torch.empty_like(held.weight)
    # One expert after another: in float32 all of them would take twice the layer's memory.
    for into, matrix in zip(matrices(weight), matrices(held.weight), strict=True):
        into.copy_(rotate_rows(inputs.apply(matrix).t()).t())
    bias = None if held.bias is None else rotate_rows(held.bias).to(held.bias.dtype)
    return replace(held, weight=weight, bias=bias)
