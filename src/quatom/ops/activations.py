"""MixedTensor: quantized activations as they flow from a quantize operation to a linear one.

Its *meaning* is fixed: T tokens of K channels in reordered position, each channel a code times the
scale of its group (`GroupLayout`). Its *bytes* belong to the kernel that will read them:

rows
    codes (T, K), int8 where every format is an integer and float16 otherwise (all codes of e4m3 and
    e2m1 are float16 numbers); scales (T, S) float32. Read by the reference and by Triton.
padded
    codes (T, S, W) int8, W channels for each group, the widest one's; scales (T, S) float32. What
    lies beyond a shorter group's channels is arbitrary. Read by int8 products on a CPU.
groups
    what the Hopper kernel copies tile by tile: see `quatom.ops.groups_layout`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import (
    GroupLayout,
    ScaleMode,
    dequantize_groups,
    join_groups,
    quantize_equal_groups,
    quantize_groups,
    split_groups,
)
from quatom.numerics.hadamard import rotate_groups
from quatom.ops.groups_layout import (
    by_token,
    check_fits_groups,
    pack_groups,
    packed_shapes,
    unpack_codes,
)

ByteLayout = Literal["rows", "padded", "groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """How a quantize operation turns real activations into codes."""

    layout: GroupLayout
    normal: str = "int4"
    """Format of the normal groups; float16 passes values through."""
    outlier: str = "int8"
    """Format of the outlier groups."""
    clip_ratio: float = 1.0
    """Fraction of a normal group's absolute maximum mapped onto the largest code."""
    rotate: bool = False
    """Rotate every normal group by a Hadamard matrix before it is quantized, as its weights are."""
    scale_mode: ScaleMode = "group"
    """How the scales of a token's normal groups depend on each other; outliers have their own."""
    byte_layout: ByteLayout = "rows"
    """What the linear operation reads: see `PreparedLinear.input_spec`."""

    def __post_init__(self) -> None:
        if self.byte_layout == "groups":
            check_fits_groups(self.layout, self.normal, self.outlier, self.scale_mode)
        if self.byte_layout == "padded" and row_dtype(self, torch.float32) is not torch.int8:
            raise ShapeError(
                f"byte layout 'padded' holds int2 to int8, not {self.normal} and {self.outlier}: "
                "use byte layout 'rows'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedTensor:
    """Quantized activations; read `codes` and `scales` only together with `byte_layout`."""

    codes: Tensor  # rows: (T, K); padded: (T, S, W) int8; groups: (S, T_padded, 128) uint8
    scales: Tensor  # rows, padded: (T, S) float32; groups: (S, T_padded / 16, 2, 16) float32
    spec: QuantizeSpec
    tokens: int
    """T."""
    dtype: torch.dtype
    """Dtype of the activations that were quantized, and of a linear's output."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K)."""
        return self.tokens, self.spec.layout.channels

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def canonical(self) -> tuple[Tensor, Tensor]:
        """Values (T, K) float32 in units of their scale, and scales (T, S) float32.

        Of multiples, byte layout `groups` remembers products and the one scale.
        """
        if self.spec.byte_layout == "rows":
            return self.codes.float(), self.scales
        if self.spec.byte_layout == "padded":
            return join_groups(self.codes.float(), self.spec.layout), self.scales
        values = unpack_codes(self.codes, self.spec.layout, self.spec.normal, self.spec.scale_mode)
        return values[: self.tokens], by_token(self.scales, 0)[: self.tokens]

    def corrections(self) -> Tensor:
        """What byte layout `groups` keeps beside the scales, (T, S) float32."""
        return by_token(self.scales, 1)[: self.tokens]

    def dequantize(self) -> Tensor:
        """The real numbers, (T, K) float32; rotated ones where `spec.rotate`."""
        if self.spec.normal == "float16" and not self.spec.layout.outliers:
            return self.codes.float()
        values, scales = self.canonical()
        return dequantize_groups(values, scales, self.spec.layout)


def quantize_rows(
    x: Tensor,  # (T, K)
    spec: QuantizeSpec,
    dtype: torch.dtype,
    order: Tensor | None = None,  # (K,) channel of x at each position; None: in order already
) -> MixedTensor:
    """Reorder and quantize rows as `spec` says: what every quantize operation does last."""
    if spec.rotate:
        x = rotate_groups(x if order is None else x.index_select(1, order), spec.layout)
        order = None
    formats = get_format(spec.normal), get_format(spec.outlier)
    if spec.byte_layout == "padded":
        groups = split_groups(x, spec.layout, order)
        groups, scales = quantize_equal_groups(
            groups, spec.layout, *formats, spec.clip_ratio, spec.scale_mode
        )
        codes = groups.to(torch.int8)
        return MixedTensor(codes=codes, scales=scales, spec=spec, tokens=x.shape[0], dtype=dtype)
    values, scales = quantize_groups(
        x, spec.layout, *formats, spec.clip_ratio, spec.scale_mode, order
    )
    return pack_values(values, scales, spec, dtype)


def pack_values(
    values: Tensor,  # (T, K) float32 in units of the scale
    scales: Tensor,  # (T, S)
    spec: QuantizeSpec,
    dtype: torch.dtype,
) -> MixedTensor:
    """Put values and scales into the byte layout that `spec` names."""
    tokens = values.shape[0]
    scales = scales.float()
    if spec.byte_layout == "groups":
        codes, scales = pack_groups(values, scales, spec.layout, spec.normal, spec.scale_mode)
        return MixedTensor(codes=codes, scales=scales, spec=spec, tokens=tokens, dtype=dtype)
    if spec.byte_layout == "padded":
        codes = split_groups(values, spec.layout).to(torch.int8)
    else:
        codes = values.to(row_dtype(spec, dtype))
    return MixedTensor(
        codes=codes,
        scales=scales.contiguous(),
        spec=spec,
        tokens=tokens,
        dtype=dtype,
    )


def allocate_groups(x: Tensor, tokens: int, spec: QuantizeSpec) -> MixedTensor:
    """An unwritten result in byte layout `groups`, of x's dtype and on its device."""
    codes_shape, scales_shape = packed_shapes(tokens, spec.layout)
    return MixedTensor(
        codes=x.new_empty(codes_shape, dtype=torch.uint8),
        scales=x.new_empty(scales_shape, dtype=torch.float32),
        spec=spec,
        tokens=tokens,
        dtype=x.dtype,
    )


def row_dtype(spec: QuantizeSpec, dtype: torch.dtype) -> torch.dtype:
    """Dtype of `rows` codes: int8, or the float dtype that holds every code."""
    if spec.normal == "float16":
        return dtype
    formats = [spec.normal] + ([spec.outlier] if spec.layout.outliers else [])
    return torch.int8 if all(get_format(f).is_integer for f in formats) else torch.float16
