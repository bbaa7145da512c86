"""MixedTensor: quantized activations as they flow from a quantize operation to a linear one.

Its *meaning* is fixed: T tokens of K channels in reordered position, each channel a code times the
scale of its group (`GroupLayout`). Its *bytes* belong to the kernel that will read them:

rows
    codes (T, K), int8 where every format is an integer and float16 otherwise (all codes of e4m3 and
    e2m1 are float16 numbers); scales (T, S) float32. Read by the reference and by Triton.
padded
    codes (T, S, W) int8, W channels for each group, the widest one's; scales (T, S) float32. What
    stands beyond a shorter group's channels is arbitrary. Read by int8 products on a CPU.
groups
    codes (S, T_padded, 128) uint8, T_padded = T rounded up to 16, and scales
    (S, T_padded / 16, 2, 16) float32: of each 16 tokens first the scales, then what the kernel adds
    to a scaled group sum because it multiplies by weight codes + 8: -8 * scale * sum of the token's
    codes (0 for outlier groups). Token t of 16 stands at place t % 8 // 2 * 4 + t // 8 * 2 + t % 2:
    a thread of the kernel has the tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 and reads them at once.
    Each group is padded to 128 bytes by zeros; the 16-byte piece p of token t stands at place
    p ^ (t % 8), the 128-byte swizzle of Hopper's matrix unit, so that one bulk copy brings a tile
    of tokens into shared memory ready for use. int4 codes are e4m3 bytes of value code * 2**-9 (the
    magnitude in the low bits: e4m3 is linear below 0x10), int8 and e4m3 codes are themselves. int8
    groups share one scale and need no corrections (0): their weights have no offset. Codes whose
    scales are multiples of one a token are held as int8 too, code * multiple, under that one scale.
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
    expand_scales,
    join_groups,
    quantize_equal_groups,
    quantize_groups,
    split_groups,
)
from quatom.numerics.hadamard import rotate_groups
from quatom.numerics.multiples import LARGEST_MULTIPLE, split_multiples

ByteLayout = Literal["rows", "padded", "groups"]

GROUP_BYTES = 128
"""Bytes of one token's group in the `groups` layout."""
TOKEN_PADDING = 16
"""T_padded is a multiple of this: so many tokens' scales are read together."""


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


def check_fits_groups(
    layout: GroupLayout, normal: str, outlier: str, scale_mode: ScaleMode
) -> None:
    """Raise ShapeError where the `groups` byte layout cannot hold these groups and formats."""
    widest = max(layout.group_sizes)
    if widest > GROUP_BYTES:
        raise ShapeError(
            f"byte layout 'groups' holds at most {GROUP_BYTES} channels a group, this layout has "
            f"{widest}: use byte layout 'rows'"
        )
    normals = ("int2", "int3", "int4", "int8", "e4m3")
    if normal not in normals or (layout.outliers and outlier != "int8"):
        raise ShapeError(
            f"byte layout 'groups' holds int2 to int4, int8 or e4m3 groups and int8 outliers, not "
            f"{normal} and {outlier}: use byte layout 'rows'"
        )
    if normal == "int8" and layout.num_normal_groups > 1 and scale_mode != "row":
        raise ShapeError(
            "byte layout 'groups' holds int8 groups of one scale a token, these have one each: use "
            "scale_mode 'row' or byte layout 'rows'"
        )
    if scale_mode == "multiples" and normal not in ("int2", "int3", "int4"):
        raise ShapeError(
            f"byte layout 'groups' holds multiples of int2 to int4 codes, not of {normal}: use "
            "byte layout 'rows'"
        )


def holds_int8(normal: str, scale_mode: ScaleMode) -> bool:
    """Whether the `groups` byte layout holds int8 normal groups under one scale a token."""
    return normal == "int8" or scale_mode == "multiples"


def padded_tokens(tokens: int) -> int:
    """T_padded of the `groups` layout."""
    return -(-tokens // TOKEN_PADDING) * TOKEN_PADDING


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
        values = _read_groups(self.codes, self.spec)[: self.tokens]
        return values, _by_token(self.scales, 0)[: self.tokens]

    def corrections(self) -> Tensor:
        """What byte layout `groups` keeps beside the scales, (T, S) float32."""
        return _by_token(self.scales, 1)[: self.tokens]

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
        padded = padded_tokens(tokens)
        if spec.scale_mode == "multiples":
            values, scales = _multiply_in(values, scales, spec.layout)
        both = scales.new_zeros(2, padded, spec.layout.num_scales)
        both[0, :tokens] = scales
        both[1, :tokens] = _offset_corrections(values, scales, spec)
        both = both.unflatten(1, (-1, 2, 4, 2)).permute(5, 1, 0, 3, 2, 4)  # see the byte layout
        return MixedTensor(
            codes=_write_groups(values, spec, padded),
            scales=both.reshape(*_scales_shape(tokens, spec)),
            spec=spec,
            tokens=tokens,
            dtype=dtype,
        )
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


def _multiply_in(values: Tensor, scales: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Normal codes times their group's multiple, and scales (T, S) of which normal groups share."""
    groups = layout.num_normal_groups
    row_scales, multiples = split_multiples(scales[:, :groups])
    # As quantizing makes them, whose largest multiple is 16: they may share a power of two.
    common = (LARGEST_MULTIPLE / multiples.amax(dim=1, keepdim=True)).log2().floor().exp2()
    factors = torch.ones_like(scales)
    factors[:, :groups] = multiples * common
    shared = scales.clone()
    shared[:, :groups] = row_scales.unsqueeze(1) / common
    return values * expand_scales(factors, layout), shared


def allocate_groups(x: Tensor, tokens: int, spec: QuantizeSpec) -> MixedTensor:
    """An unwritten result in byte layout `groups`, of x's dtype and on its device."""
    shape = (spec.layout.num_scales, padded_tokens(tokens), GROUP_BYTES)
    return MixedTensor(
        codes=x.new_empty(shape, dtype=torch.uint8),
        scales=x.new_empty(_scales_shape(tokens, spec), dtype=torch.float32),
        spec=spec,
        tokens=tokens,
        dtype=x.dtype,
    )


def _scales_shape(tokens: int, spec: QuantizeSpec) -> tuple[int, int, int, int]:
    """Shape of `MixedTensor.scales` in byte layout `groups`."""
    return spec.layout.num_scales, padded_tokens(tokens) // TOKEN_PADDING, 2, TOKEN_PADDING


def _by_token(scales: Tensor, kind: int) -> Tensor:
    """Scales (0) or corrections (1) of byte layout `groups`, (T_padded, S)."""
    places = scales[:, :, kind].unflatten(2, (4, 2, 2))  # token pair, half of 16, token
    return places.transpose(2, 3).flatten(1).t()


def row_dtype(spec: QuantizeSpec, dtype: torch.dtype) -> torch.dtype:
    """Dtype of `rows` codes: int8, or the float dtype that holds every code."""
    if spec.normal == "float16":
        return dtype
    formats = [spec.normal] + ([spec.outlier] if spec.layout.outliers else [])
    return torch.int8 if all(get_format(f).is_integer for f in formats) else torch.float16


def _swizzle(device: torch.device, tokens: int) -> Tensor:
    """Place of each byte of a token's group: (T, 128) int64; its own inverse."""
    byte = torch.arange(GROUP_BYTES, device=device)
    token = torch.arange(tokens, device=device)[:, None]
    return ((byte // 16) ^ (token % 8)) * 16 + byte % 16


def _unit(spec: QuantizeSpec) -> float:
    """Number that stands for a normal code of 1.

    int4 codes are multiples of the smallest e4m3 step: their byte is their magnitude.
    """
    is_itself = spec.normal == "e4m3" or holds_int8(spec.normal, spec.scale_mode)
    return 1.0 if is_itself else 2.0**-9


def _offset_corrections(values: Tensor, scales: Tensor, spec: QuantizeSpec) -> Tensor:
    """-8 * scale * sum of codes, (T, S), in steps of the matrix unit: weights are 2**-9 each."""
    normal = spec.layout.num_normal_groups
    parts = values.float().split(spec.layout.group_sizes, dim=-1)
    sums = torch.stack([part.sum(dim=-1) for part in parts], dim=1) * (-(2.0**-6) * _unit(spec))
    sums[:, 0 if holds_int8(spec.normal, spec.scale_mode) else normal :] = 0.0
    return sums * scales


def _write_groups(values: Tensor, spec: QuantizeSpec, padded: int) -> Tensor:
    tokens = values.shape[0]
    unit = _unit(spec)
    is_int8 = holds_int8(spec.normal, spec.scale_mode)
    layout = spec.layout
    out = torch.zeros(
        layout.num_scales, padded, GROUP_BYTES, dtype=torch.uint8, device=values.device
    )
    parts = values.split(layout.group_sizes, dim=-1)
    for group, part in enumerate(parts):
        if group < layout.num_normal_groups and not is_int8:
            bytes_ = (part.float() * unit).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            bytes_ = part.to(torch.int8).view(torch.uint8)
        out[group, :tokens, : part.shape[1]] = bytes_
    return out.gather(2, _swizzle(out.device, padded).expand_as(out))


def _read_groups(codes: Tensor, spec: QuantizeSpec) -> Tensor:
    plain = codes.gather(2, _swizzle(codes.device, codes.shape[1]).expand_as(codes))
    unit = 1.0 / _unit(spec)
    is_int8 = holds_int8(spec.normal, spec.scale_mode)
    layout = spec.layout
    parts = []
    for group, size in enumerate(layout.group_sizes):
        bytes_ = plain[group, :, :size].contiguous()
        if group < layout.num_normal_groups and not is_int8:
            parts.append(bytes_.view(torch.float8_e4m3fn).float() * unit)
        else:
            parts.append(bytes_.view(torch.int8).float())
    return torch.cat(parts, dim=-1)
