"""Codes of the KV cache: asymmetric quantization of a row, and INT4 codes in bytes.

`quatom.numerics.kv_pages` says what a code means and where it is stored.
"""

import torch
from torch import Tensor

from quatom.numerics.groups import MIN_SCALE

_FLOAT16_MAX = 65504.0


def asymmetric_range(
    x: Tensor,  # (..., D)
    bits: int,
    clip_ratio: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each row, two (..., 1) float16 tensors."""
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if clip_ratio != 1.0:
        margin = (high - low) * (0.5 * (1.0 - clip_ratio))
        low, high = low + margin, high - margin
    # A float32 input may lie outside float16: an infinite minimum would poison the whole row.
    minimum = low.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX).half()
    scale = (high - minimum).div_(2**bits - 1)  # a float32 and a float16 tensor: in float32
    return scale.clamp_(MIN_SCALE, _FLOAT16_MAX).half(), minimum


def asymmetric_codes(
    x: Tensor,  # (..., D)
    scale: Tensor,  # (..., 1) float16
    minimum: Tensor,  # (..., 1) float16
    bits: int,
) -> Tensor:
    """Codes 0 to 2**bits - 1 of the rows, (..., D) uint8."""
    steps = (x.float() - minimum).div_(scale).round_()
    return steps.clamp_(0, 2**bits - 1).to(torch.uint8)


def pack_halves(codes: Tensor) -> Tensor:
    """(..., D) codes below 16 -> (..., D / 2) uint8: channel j low, channel j + D / 2 high."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def unpack_halves(packed: Tensor) -> Tensor:
    """The inverse of `pack_halves`: (..., D / 2) uint8 of even D / 2 -> (..., D) uint8."""
    # Shifts of bytes are slow on a CPU: words of 4 of them, or of 2.
    word, mask = (torch.int16, 0x0F0F) if packed.shape[-1] % 4 else (torch.int32, 0x0F0F0F0F)
    words = packed.view(word)
    return torch.cat((words & mask, (words >> 4) & mask), dim=-1).view(torch.uint8)
