"""Codes of 2 to 8 bits in bytes, and back.

A row of codes is a little-endian bit string: code i occupies bits [i * bits, (i + 1) * bits), bit
b of the string is bit b % 8 of byte b // 8. For 4 bits that is: even channel in the low nibble,
odd channel in the high one.
"""

import torch
from torch import Tensor

from quatom.errors import ShapeError


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take.

    Raises:
        ShapeError: they do not fill whole bytes.
    """
    if count * bits % 8:
        raise ShapeError(
            f"{count} codes of {bits} bits are {count * bits} bits, which is no whole number of "
            "bytes; use a multiple of 8 codes"
        )
    return count * bits // 8


def pack_bits(
    patterns: Tensor,  # (..., K) uint8, only the low `bits` bits are used
    bits: int,
) -> Tensor:
    """Pack bit patterns along the last axis: (..., K * bits / 8) uint8."""
    packed_bytes(patterns.shape[-1], bits)
    if bits == 8:
        return patterns.contiguous()
    if bits == 4:
        return patterns[..., 0::2] | (patterns[..., 1::2] << 4)
    # Eight codes fill `bits` whole bytes; an int64 holds them all (8 * 7 = 56 bits).
    eights = patterns.unflatten(-1, (-1, 8)).long()
    shifts = torch.arange(8, device=patterns.device) * bits
    words = (eights << shifts).sum(dim=-1, keepdim=True)
    bytes_ = (words >> (torch.arange(bits, device=patterns.device) * 8)) & 0xFF
    return bytes_.flatten(-2).to(torch.uint8)


def unpack_bits(
    packed: Tensor,  # (..., K * bits / 8) uint8
    bits: int,
) -> Tensor:
    """The inverse of `pack_bits`: (..., K) uint8 bit patterns."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    words = packed.unflatten(-1, (-1, bits)).long()
    words = (words << (torch.arange(bits, device=packed.device) * 8)).sum(dim=-1, keepdim=True)
    shifts = torch.arange(8, device=packed.device) * bits
    return ((words >> shifts) & (2**bits - 1)).flatten(-2).to(torch.uint8)
