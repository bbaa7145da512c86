"""Random operands of linear layers for measurements."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from quatom.benchmark.timing import copies_to_rotate
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, ScaleMode, expand_scales
from quatom.numerics.multiples import LARGEST_MULTIPLE
from quatom.ops.activations import MixedTensor, QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.groups_layout import holds_int8
from quatom.ops.linear import PreparedLinear, prepare_weights

OUTLIERS = 128


@dataclass(frozen=True)
class HopperOperands:
    """Packed weights of one shape, as many copies as it takes to leave the L2 cache."""

    values: Tensor
    """Codes, (N, K) int8."""
    scales: Tensor
    layout: GroupLayout
    grouped: list[PreparedLinear]
    """For activations with scales of their own a group."""
    integer: list[PreparedLinear]
    """For activations that are held as INT8 under one scale per token."""

    def layers(self, fmt: str, scale_mode: ScaleMode) -> list[PreparedLinear]:
        """Copies for activations of this format."""
        copies = self.integer if holds_int8(fmt, scale_mode) else self.grouped
        return [replace(layer, activation_format=fmt) for layer in copies]

    def activations(self, tokens: int, fmt: str, scale_mode: ScaleMode) -> MixedTensor:
        """Random activations of `tokens` tokens."""
        return random_activations(tokens, self.layout, fmt, "groups", scale_mode)


def random_activations(
    tokens: int,
    layout: GroupLayout,
    fmt: str,
    byte_layout: Literal["rows", "groups"],
    scale_mode: ScaleMode = "group",
) -> MixedTensor:
    """Random codes with random scales, in the byte layout of a backend."""
    normal = torch.randn(tokens, layout.normal, device="cuda")
    normal = get_format(fmt).round(normal * get_format(fmt).largest / 3)
    outliers = torch.randint(-127, 128, (tokens, layout.outliers), device="cuda").float()
    scales = (torch.rand(tokens, layout.num_scales, device="cuda") * 0.01 + 1e-3).half()
    groups = layout.num_normal_groups
    if scale_mode == "row":
        scales[:, :groups] = scales[:, :1]
    elif scale_mode == "multiples":
        scales[:, :groups] = _random_multiples(tokens, groups)
    spec = QuantizeSpec(layout=layout, normal=fmt, scale_mode=scale_mode, byte_layout=byte_layout)
    return pack_values(torch.cat((normal, outliers), dim=1), scales, spec, torch.float16)


def random_weights(channels: int, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """INT4 codes with INT8 outliers, (N, K) int8, and scales (N, S): multiples of row scales."""
    values = torch.randint(-8, 8, (channels, layout.channels), device="cuda", dtype=torch.int8)
    values[:, layout.normal :] = torch.randint(
        -127, 128, (channels, layout.outliers), device="cuda", dtype=torch.int8
    )
    return values, _random_multiples(channels, layout.num_scales)


def _random_multiples(rows: int, groups: int) -> Tensor:
    """Scales (rows, groups) float16: multiples of one scale per row."""
    row_scales = torch.randint(64, 128, (rows, 1), device="cuda") * 2.0**-17
    most = LARGEST_MULTIPLE
    return (row_scales * torch.randint(most // 2, most + 1, (rows, groups), device="cuda")).half()


def hopper_operands(channels: int, k: int) -> HopperOperands:
    """Random weights (N, K) with 128 outliers, packed for the Hopper kernel."""
    layout = GroupLayout(k - OUTLIERS, 128, OUTLIERS)
    values, scales = random_weights(channels, layout)

    def copies(**formats: Any) -> list[PreparedLinear]:
        first = prepare_weights(values, scales, layout, backend=Backend.CUDA, **formats)
        weights, *rest = first.tensors
        others = (weights.clone() for _ in range(copies_to_rotate(weights.numel()) - 1))
        return [first, *(replace(first, tensors=(other, *rest)) for other in others)]

    integer = copies(activation_format="int8", scale_mode="row")
    return HopperOperands(values, scales, layout, copies(), integer)


def relative_error(
    y: Tensor, x: MixedTensor, values: Tensor, scales: Tensor, rows: Tensor | None = None
) -> float:
    """Error of the first 256 rows of y, products of `rows` of x or of all, against float64."""
    layout = x.spec.layout
    weights = values.double() * expand_scales(scales, layout).double()
    real = x.dequantize()
    real = real[:256] if rows is None else real[rows[:256]]
    want = real.double() @ weights.t()
    return ((y[:256].double() - want).norm() / want.norm()).item()
