"""Byte layout `groups`: quantized activations as the Hopper kernels copy and multiply them.

codes are (S, T_padded, 128) uint8, T_padded = T rounded up to 16, and scales (S, T_padded / 16, 2,
16) float32: of each 16 tokens first the scales, then what the kernel adds to a scaled group sum
because it multiplies by weight codes + 8: -8 * scale * sum of the token's codes (0 for outlier
groups). Token t of 16 is at place t % 8 // 2 * 4 + t // 8 * 2 + t % 2: a thread of the kernel
has the tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 and reads them at once.

Each group is padded to 128 bytes by zeros; the 16-byte piece p of token t is at place
p ^ (t % 8), the 128-byte swizzle of Hopper's matrix unit, so that one bulk copy brings a tile of
tokens into shared memory ready for use. int4 codes are e4m3 bytes of value code * 2**-9 (the
magnitude in the low bits: e4m3 is linear below 0x10), int8 and e4m3 codes are themselves.

int8 groups share one scale and need no corrections (0): their weights have no offset. Codes whose
scales are multiples of one per token are held as int8 too, code * multiple, under that one scale.
"""

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout, ScaleMode, expand_scales
from quatom.numerics.multiples import LARGEST_MULTIPLE, split_multiples

GROUP_BYTES = 128
"""Bytes of one token's group."""
TOKEN_PADDING = 16
"""T_padded is a multiple of this: so many tokens' scales are read together."""


def check_fits_groups(
    layout: GroupLayout, normal: str, outlier: str, scale_mode: ScaleMode
) -> None:
    """Raise ShapeError where the `groups` byte layout cannot hold these groups and formats."""
    widest = max(layout.group_sizes)
    if widest > GROUP_BYTES:
        raise ShapeError(
            f"byte layout 'groups' holds at most {GROUP_BYTES} channels per group, this layout has "
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
            "byte layout 'groups' holds int8 groups of one scale per token, these have one each: "
            "use scale_mode 'row' or byte layout 'rows'"
        )
    if scale_mode == "multiples" and normal not in ("int2", "int3", "int4"):
        raise ShapeError(
            f"byte layout 'groups' holds multiples of int2 to int4 codes, not of {normal}: use "
            "byte layout 'rows'"
        )


def holds_int8(normal: str, scale_mode: ScaleMode) -> bool:
    """Whether the `groups` byte layout holds int8 normal groups under one scale per token."""
    return normal == "int8" or scale_mode == "multiples"


def packed_shapes(tokens: int, layout: GroupLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales."""
    padded = padded_tokens(tokens)
    groups = layout.num_scales
    return (groups, padded, GROUP_BYTES), (groups, padded // TOKEN_PADDING, 2, TOKEN_PADDING)


def padded_tokens(tokens: int) -> int:
    """T_padded."""
    return -(-tokens // TOKEN_PADDING) * TOKEN_PADDING


def pack_groups(
    values: Tensor,  # (T, K) float32 in units of the scale
    scales: Tensor,  # (T, S) float32
    layout: GroupLayout,
    normal: str,
    scale_mode: ScaleMode,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of this layout."""
    tokens = values.shape[0]
    if scale_mode == "multiples":
        values, scales = _multiply_in(values, scales, layout)
    _, scales_shape = packed_shapes(tokens, layout)
    both = scales.new_zeros(2, padded_tokens(tokens), layout.num_scales)
    both[0, :tokens] = scales
    if not holds_int8(normal, scale_mode):
        both[1, :tokens] = _offset_corrections(values, scales, layout, _unit(normal))
    both = both.unflatten(1, (-1, 2, 4, 2)).permute(5, 1, 0, 3, 2, 4)  # see above
    return _pack_codes(values, layout, normal, scale_mode), both.reshape(*scales_shape)


def by_token(scales: Tensor, kind: int) -> Tensor:
    """Scales (0) or corrections (1), (T_padded, S)."""
    places = scales[:, :, kind].unflatten(2, (4, 2, 2))  # token pair, half of 16, token
    return places.transpose(2, 3).flatten(1).t()


def unpack_codes(codes: Tensor, layout: GroupLayout, normal: str, scale_mode: ScaleMode) -> Tensor:
    """Values (T_padded, K) float32 in units of the scale; of multiples, products."""
    plain = codes.gather(2, _swizzle(codes.device, codes.shape[1]).expand_as(codes))
    parts = []
    for group, size in enumerate(layout.group_sizes):
        bytes_ = plain[group, :, :size].contiguous()
        if group >= layout.num_normal_groups or holds_int8(normal, scale_mode):
            parts.append(bytes_.view(torch.int8).float())
        else:
            parts.append(bytes_.view(torch.float8_e4m3fn).float() / _unit(normal))
    return torch.cat(parts, dim=-1)


def _pack_codes(values: Tensor, layout: GroupLayout, normal: str, scale_mode: ScaleMode) -> Tensor:
    tokens = values.shape[0]
    codes_shape, _ = packed_shapes(tokens, layout)
    out = torch.zeros(codes_shape, dtype=torch.uint8, device=values.device)
    for group, part in enumerate(values.split(layout.group_sizes, dim=-1)):
        if group >= layout.num_normal_groups or holds_int8(normal, scale_mode):
            bytes_ = part.to(torch.int8).view(torch.uint8)
        else:
            bytes_ = (part.float() * _unit(normal)).to(torch.float8_e4m3fn).view(torch.uint8)
        out[group, :tokens, : part.shape[1]] = bytes_
    return out.gather(2, _swizzle(out.device, codes_shape[1]).expand_as(out))


def _unit(normal: str) -> float:
    """E4m3 number that stands for a normal code of 1.

    int4 codes are multiples of the smallest e4m3 step: their byte is their magnitude.
    """
    return 1.0 if normal == "e4m3" else 2.0**-9


def _offset_corrections(values: Tensor, scales: Tensor, layout: GroupLayout, unit: float) -> Tensor:
    """-8 * scale * sum of codes, (T, S), in steps of the matrix unit: weights are 2**-9 each."""
    parts = values.float().split(layout.group_sizes, dim=-1)
    sums = torch.stack([part.sum(dim=-1) for part in parts], dim=1) * (-(2.0**-6) * unit)
    sums[:, layout.num_normal_groups :] = 0.0
    return sums * scales


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


def _swizzle(device: torch.device, tokens: int) -> Tensor:
    """Place of each byte of a token's group: (T, 128) int64; its own inverse."""
    byte = torch.arange(GROUP_BYTES, device=device)
    token = torch.arange(tokens, device=device)[:, None]
    return ((byte // 16) ^ (token % 8)) * 16 + byte % 16
