"""Scales of a row's groups as small multiples of one row scale: s = m * row scale, 1 <= m <= 16.

A weight is then code * m * row scale, and code * m fits INT8 (-8 * 16 = -128), so that an integer
GEMM carries the group scales inside its weights and adds up over all groups without leaving int32.
A row scale has at most 7 significant bits: every multiple is a float16 number, stored like any
other scale.

Source: the two scale levels of QServe (Lin et al., MLSys 2025), here symmetric.
"""

import torch
from torch import Tensor

from quatom.errors import QuantizationError
from quatom.numerics.packing import pack_bits, unpack_bits

LARGEST_MULTIPLE = 16
WEIGHT_MULTIPLE = 13
"""Multiple of the largest scale of a weight's row: GPTQ pushes errors onto columns that follow,
whose groups then need larger scales than the unchanged weights did."""
_ROW_SCALE_BITS = 7  # float16 has 11 significant bits, a multiple below 16 needs 4
_FLOAT16_STEP = 2.0**-24


def find_row_scales(scales: Tensor, multiple: int) -> Tensor:  # (..., G) -> (...) float32
    """Least row scales of which `multiple` reach all of the row's scales."""
    mantissa, exponent = torch.frexp(scales.float().amax(dim=-1) / multiple)
    return torch.ldexp((mantissa * 2**_ROW_SCALE_BITS).ceil(), exponent - _ROW_SCALE_BITS)


def nearest_row_scales(row_scales: Tensor) -> Tensor:  # float32
    """The nearest numbers that can be row scales."""
    mantissa, exponent = torch.frexp(row_scales)
    return torch.ldexp((mantissa * 2**_ROW_SCALE_BITS).round(), exponent - _ROW_SCALE_BITS)


def nearest_multiple(scale: Tensor, row_scale: Tensor) -> Tensor:
    """The multiple of `row_scale` nearest to `scale`, of the same shape; float32."""
    return (scale.float() / row_scale).round().clamp(1, LARGEST_MULTIPLE) * row_scale


def split_multiples(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales (N,) float32 and multiples (N, G) int64 of float16 scales (N, G); exact.

    A row scale is the greatest number that divides all scales of its row.

    Raises:
        QuantizationError: a row has none whose multiples end at 16.
    """
    steps = (scales.double() / _FLOAT16_STEP).long()
    row_scale = steps[:, 0]
    for group in range(1, steps.shape[1]):
        row_scale = torch.gcd(row_scale, steps[:, group])
    multiples = steps // row_scale.clamp(min=1).unsqueeze(1)
    if (multiples > LARGEST_MULTIPLE).any():
        raise QuantizationError(
            f"a row's scales are multiples up to {int(multiples.max())} of one number, at most "
            f"{LARGEST_MULTIPLE} are allowed: quantize with weights.scale_format 'multiples'"
        )
    return row_scale.double().mul(_FLOAT16_STEP).float(), multiples


def multiple_bytes(groups: int, blocks: int) -> int:
    """Bytes of a row of `pack_multiples`."""
    return blocks * -(-groups // (2 * blocks))


def pack_multiples(multiples: Tensor, blocks: int) -> Tensor:  # (N, G) of 1 to 16
    """Multiples as 4-bit codes, the multiple less one: (N, multiple_bytes) uint8.

    The groups of each of `blocks` tensor-parallel blocks begin with a byte of their own, so that
    equal slices of the bytes hold the groups of equal slices of the channels. A code that pads an
    odd number of groups is 0.
    """
    codes = (multiples - 1).to(torch.uint8).unflatten(1, (blocks, -1))
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return pack_bits(codes, 4).flatten(1)


def unpack_multiples(packed: Tensor, groups: int, blocks: int) -> Tensor:
    """The inverse of `pack_multiples`: (N, G) int64."""
    codes = unpack_bits(packed.unflatten(1, (blocks, -1)), 4)[..., : groups // blocks]
    return codes.flatten(1).long() + 1
