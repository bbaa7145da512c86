"""Symmetric group-wise quantization: the arithmetic that every kernel must reproduce.

A row of K channels, already in reordered position, is cut into normal groups of `group_size`
channels followed by outlier groups. Each group s has one scale:

    scale = float16(clip_ratio * absmax / largest), at least 2**-14
    code  = round_half_even(x / scale), saturated        (the *stored* scale divides)
    real  = code * scale

Outlier groups are never clipped: they are kept because their range matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.formats import Format

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
        """S: scales a row."""
        return self.num_normal_groups + self.num_outlier_groups

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Channels of each of the S groups, in order."""
        full, rest = divmod(self.normal, self.group_size)
        sizes = [self.group_size] * full + ([rest] if rest else [])
        if self.outliers:
            sizes += [self.outliers // self.outlier_blocks] * self.outlier_blocks
        return tuple(sizes)


def _split(x: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor | None]:
    """(..., K) -> normal (..., G, group_size) zero-padded, outliers (..., B, R / B) or None."""
    if x.shape[-1] != layout.channels:
        raise ShapeError(f"row has {x.shape[-1]} channels, its layout {layout.channels}: {layout}")
    normal = x[..., : layout.normal]
    missing = layout.num_normal_groups * layout.group_size - layout.normal
    if missing:
        normal = torch.nn.functional.pad(normal, (0, missing))
    normal = normal.unflatten(-1, (layout.num_normal_groups, layout.group_size))
    if not layout.outliers:
        return normal, None
    return normal, x[..., layout.normal :].unflatten(-1, (layout.outlier_blocks, -1))


def symmetric_scale(absmax: Tensor, fmt: Format, clip_ratio: float | Tensor = 1.0) -> Tensor:
    """The step that maps clip_ratio * absmax onto the format's largest value; float16."""
    if not fmt.is_quantized:
        return torch.ones_like(absmax, dtype=torch.float16)
    return (absmax.float() * clip_ratio / fmt.largest).clamp(min=MIN_SCALE).half()


def group_scales(
    x: Tensor,  # (..., K)
    layout: GroupLayout,
    normal: Format,
    outlier: Format,
    clip_ratio: float = 1.0,
) -> Tensor:
    """Scale of each group, (..., S) float16; outlier groups are not clipped."""
    groups, outliers = _split(x, layout)
    scales = symmetric_scale(groups.abs().amax(dim=-1), normal, clip_ratio)
    if outliers is None:
        return scales
    return torch.cat((scales, symmetric_scale(outliers.abs().amax(dim=-1), outlier)), dim=-1)


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


def round_to_scales(
    x: Tensor,  # (..., K)
    scales: Tensor,  # (..., S) float16
    layout: GroupLayout,
    normal: Format,
    outlier: Format,
) -> Tensor:
    """Values of the formats nearest to x / scale, (..., K) float32."""
    units = x.float() / expand_scales(scales, layout)
    if not layout.outliers:
        return normal.round(units)
    parts = units.split((layout.normal, layout.outliers), dim=-1)
    return torch.cat((normal.round(parts[0]), outlier.round(parts[1])), dim=-1)


def quantize_groups(
    x: Tensor,  # (..., K)
    layout: GroupLayout,
    normal: Format,
    outlier: Format,
    clip_ratio: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Quantize rows group by group.

    Returns:
        values (..., K) float32 in units of the scale, and scales (..., S) float16.
    """
    scales = group_scales(x, layout, normal, outlier, clip_ratio)
    return round_to_scales(x, scales, layout, normal, outlier), scales


def dequantize_groups(values: Tensor, scales: Tensor, layout: GroupLayout) -> Tensor:
    """Values (..., K) * scales (..., S) -> (..., K) float32."""
    return values.float() * expand_scales(scales, layout)
