"""Symmetric group-wise quantization: the arithmetic that every kernel must reproduce.

A row of K channels, already in reordered position, is cut into normal groups of `group_size`
channels followed by outlier groups. Each group s has one scale:

    scale = float16(clip_ratio * absmax / largest), at least 2**-14
    code  = round_half_even(x / scale), saturated        (the *stored* scale divides)
    real  = code * scale

Outlier groups are never clipped: they are kept because their range matters. The scales of a row's
normal groups may depend on each other, see `ScaleMode`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.formats import Format
from quatom.numerics.multiples import LARGEST_MULTIPLE, find_row_scales, nearest_multiple

ScaleMode = Literal["group", "row", "multiples"]
"""Scales of a row's normal groups: each its own; one for all, that of the largest magnitude; or
multiples of one, see `quatom.numerics.multiples`."""

MIN_SCALE = 2.0**-14
"""Smallest normal float16. Below it a stored scale would lose its relative precision."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How a row of K reordered channels is cut into groups.

    Example: K = 4096, 128 outliers in one block, group_size 128: 31 normal groups of 128 channels,
    then one outlier group of 128; `num_scales` is 32. K = 576 with 32 outliers: four groups of
    128, a short one of 32, one outlier group of 32.
    """

    normal: int
    """Channels before the outliers."""
    group_size: int
    """Channels of a normal group; the last may be shorter. Equal to `normal` for whole rows."""
    outliers: int = 0
    """Outlier channels, all blocks together."""
    outlier_blocks: int = 1
    """Outlier groups of equal size: one for each tensor-parallel block."""

    def __post_init__(self) -> None:
        if self.normal < 1 or self.group_size < 1 or self.outliers < 0 or self.outlier_blocks < 1:
            raise ShapeError(f"group layout has a size that is not positive: {self}")
        if self.outliers % self.outlier_blocks:
            raise ShapeError(
                f"{self.outliers} outliers do not divide into {self.outlier_blocks} equal blocks"
            )

    @property
    def channels(self) -> int:
        """K."""
        return self.normal + self.outliers

    @property
    def num_normal_groups(self) -> int:
        """G: normal groups, the short last one included."""
        return -(-self.normal // self.group_size)

    @property
    def num_outlier_groups(self) -> int:
        """B, or 0 without outliers."""
        return self.outlier_blocks if self.outliers else 0

    @property
    def num_scales(self) -> int:
        """S: scales per row."""
        return self.num_normal_groups + self.num_outlier_groups

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Channels of each of the S groups, in order."""
        full, rest = divmod(self.normal, self.group_size)
        sizes = [self.group_size] * full + ([rest] if rest else [])
        if self.outliers:
            sizes += [self.outliers // self.outlier_blocks] * self.outlier_blocks
        return tuple(sizes)


@cache
def _padding(layout: GroupLayout, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """How to make groups equally wide, W channels each; None where they are.

    Returns:
        columns (S * W,) int32, the channel at each place (a short group repeats its first one,
        which changes no maximum), and places (K,) int32, the position of each channel.
    """
    sizes = torch.tensor(layout.group_sizes)
    width = int(sizes.max())
    if (sizes == width).all():
        return None
    with torch.inference_mode(False):  # the tensors outlive this call
        starts = sizes.cumsum(0) - sizes
        within = torch.arange(width).expand(len(sizes), width)
        real = within < sizes[:, None]
        columns = (starts[:, None] + within * real).flatten()
        places = real.flatten().nonzero().squeeze(1)
        return columns.int().to(device), places.int().to(device)


def split_groups(
    x: Tensor,  # (..., C)
    layout: GroupLayout,
    order: Tensor | None = None,  # (K,) channel of x at each position; None: C is K, in order
) -> Tensor:
    """Rows in reordered position, cut into groups of equal width: (..., S, W) float32.

    A group of less than W channels is filled up with its first one, which changes no maximum.

    Raises:
        ShapeError: x or order has another number of channels than the layout.
    """
    channels = x.shape[-1] if order is None else order.shape[0]
    if channels != layout.channels:
        raise ShapeError(f"row has {channels} channels, its layout {layout.channels}: {layout}")
    padding = _padding(layout, x.device)
    if padding is not None:
        order = padding[0] if order is None else order.index_select(0, padding[0])
    if order is not None:
        x = x.index_select(-1, order)
    return x.float().unflatten(-1, (layout.num_scales, -1))


def join_groups(groups: Tensor, layout: GroupLayout) -> Tensor:
    """The inverse of `split_groups`: (..., S, W) -> (..., K)."""
    padding = _padding(layout, groups.device)
    values = groups.flatten(-2)
    return values if padding is None else values.index_select(-1, padding[1])


def symmetric_scale(absmax: Tensor, fmt: Format, clip_ratio: float | Tensor = 1.0) -> Tensor:
    """The step that maps clip_ratio * absmax onto the format's largest value; float16."""
    if not fmt.is_quantized:
        return torch.ones_like(absmax, dtype=torch.float16)
    return (absmax.float() * clip_ratio / fmt.largest).clamp(min=MIN_SCALE).half()


@cache
def _integer_bounds(
    layout: GroupLayout, normal: Format, outlier: Format, clip_ratio: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clip ratio and largest code (S,), largest and smallest code (S, 1) of the groups, float32."""
    is_normal = torch.arange(layout.num_scales) < layout.num_normal_groups
    with torch.inference_mode(False):  # the tensors outlive this call
        clip = torch.where(is_normal, clip_ratio, 1.0).to(device)
        largest = torch.where(is_normal, normal.largest, outlier.largest).to(device)
        return clip, largest, largest.unsqueeze(1), (-1.0 - largest).unsqueeze(1)


def expand_scales(scales: Tensor, layout: GroupLayout) -> Tensor:
    """(..., S) -> (..., K) float32: every channel's own scale."""
    scales = scales.float()
    normal = scales[..., : layout.num_normal_groups].repeat_interleave(layout.group_size, dim=-1)
    normal = normal[..., : layout.normal]
    if not layout.outliers:
        return normal
    width = layout.outliers // layout.outlier_blocks
    outliers = scales[..., layout.num_normal_groups :].repeat_interleave(width, dim=-1)
    return torch.cat((normal, outliers), dim=-1)


def quantize_groups(
    x: Tensor,  # (..., K)
    layout: GroupLayout,
    normal: Format,
    outlier: Format,
    clip_ratio: float = 1.0,
    scale_mode: ScaleMode = "group",
    order: Tensor | None = None,  # (K,) int32 or int64
) -> tuple[Tensor, Tensor]:
    """Quantize rows group by group.

    Args:
        scale_mode: how the scales of a row's normal groups depend on each other.
        order: channel of x that belongs at each position of the layout; None: it is there.

    Returns:
        values (..., K) float32 in units of the scale, and scales (..., S) float16.

    Raises:
        ShapeError: x or order has another number of channels than the layout.
    """
    groups = split_groups(x, layout, order)
    values, scales = quantize_equal_groups(groups, layout, normal, outlier, clip_ratio, scale_mode)
    return join_groups(values, layout), scales.half()


def quantize_equal_groups(
    groups: Tensor,  # (..., S, W) float32 from `split_groups`
    layout: GroupLayout,
    normal: Format,
    outlier: Format,
    clip_ratio: float = 1.0,
    scale_mode: ScaleMode = "group",
) -> tuple[Tensor, Tensor]:
    """`quantize_groups` of rows that are cut already.

    Returns:
        values (..., S, W) and scales (..., S), float32; the scales are float16 numbers.
    """
    absmax = groups.abs().amax(dim=-1)
    if scale_mode == "row":
        normal_absmax = absmax[..., : layout.num_normal_groups]
        normal_absmax.copy_(normal_absmax.amax(dim=-1, keepdim=True).expand_as(normal_absmax))
    if normal.is_integer and (outlier.is_integer or not layout.outliers):
        # All groups at once: on few rows the number of operations is what quantization costs.
        bounds = _integer_bounds(layout, normal, outlier, clip_ratio, groups.device)
        clip, largest, largest_code, smallest_code = bounds
        scales = absmax.mul_(clip).div_(largest).clamp_(min=MIN_SCALE).half().float()
        if scale_mode == "multiples":
            _snap_to_multiples(scales[..., : layout.num_normal_groups])
        values = groups.div(scales.unsqueeze(-1)).round_()
        torch.minimum(values, largest_code, out=values)
        return torch.maximum(values, smallest_code, out=values), scales
    parts = (layout.num_normal_groups, layout.num_outlier_groups)
    formats, ratios = (normal, outlier), (clip_ratio, 1.0)
    scales = torch.cat(
        [*map(symmetric_scale, absmax.split(parts, dim=-1), formats, ratios)], dim=-1
    ).float()
    if scale_mode == "multiples":
        _snap_to_multiples(scales[..., : layout.num_normal_groups])
    units = (groups / scales.unsqueeze(-1)).split(parts, dim=-2)
    rounded = [fmt.round(u) for fmt, u in zip(formats, units, strict=True) if u.numel()]
    return torch.cat(rounded, dim=-2), scales


def _snap_to_multiples(scales: Tensor) -> None:  # (..., G), in place
    row_scales = find_row_scales(scales, LARGEST_MULTIPLE).unsqueeze(-1)
    scales.copy_(nearest_multiple(scales, row_scales))


def dequantize_groups(values: Tensor, scales: Tensor, layout: GroupLayout) -> Tensor:
    """Values (..., K) * scales (..., S) -> (..., K) float32."""
    return values.float() * expand_scales(scales, layout)
