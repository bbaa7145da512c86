"""`linear` on a CPU: exact int8 products of whole groups, scaled and added group by group.

All groups of a layer are one grouped 1x1 convolution of oneDNN: an image of T pixels whose S * W
channels are S groups, with N output channels each, packed weights of one byte, and the weight
scales as the scales of the S * N output channels. Integer dot products are exact whatever order a
library adds them in; the scaled groups add up in float32.

Codes take one byte a weight, a quarter of what the reference holds, and a decode reads them all:
int8 products are 4 to 5 times faster here than float32 ones.
"""

import torch
from torch import Tensor

from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor

ROWS_AT_ONCE = 32
"""Rows whose sums of all groups are held at once: more drop out of a core's cache."""
ZERO_POINT = 128
"""oneDNN multiplies unsigned by signed bytes: activations go in as code + 128."""


def cpu_obstacle(values: Tensor, formats: tuple[str, ...]) -> str | None:
    """Why this backend cannot run weights `values` in these formats, or None if it can."""
    if values.device.type != "cpu":
        return f"it runs on a CPU, the weights are on {values.device}"
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        # Without these instructions oneDNN adds pairs of products in 16 bits, which saturate.
        return "it needs a CPU with AVX-512 VNNI, and oneDNN, for exact int8 products"
    wrong = [name for name in formats if not name.startswith("int")]
    if wrong:
        return f"it multiplies integers of at most 8 bits, not {' and '.join(wrong)}"
    return None


def prepare_cpu(values: Tensor, scales: Tensor, layout: GroupLayout) -> tuple[Tensor, ...]:
    """Codes as oneDNN packs them, scales and zero points: (S * N,) float32 and int32."""
    rows, sizes = values.shape[0], layout.group_sizes
    padded = values.new_zeros((len(sizes), rows, max(sizes)), dtype=torch.int8)
    for group, part in zip(padded, values.split(sizes, dim=1), strict=True):
        group[:, : part.shape[1]] = part
    weight_scales = scales.float().t().flatten()
    packed = torch.ops.onednn.qconv_prepack(
        padded.view(-1, max(sizes), 1, 1),
        weight_scales,
        1.0,
        ZERO_POINT,
        [1, 1],
        [0, 0],
        [1, 1],
        len(sizes),
        None,
    )
    return packed, weight_scales, torch.zeros_like(weight_scales, dtype=torch.int32)


def linear_cpu(x: MixedTensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """See `linear`; x has integer codes in the `padded` layout."""
    pixels = x.codes.view(torch.uint8) ^ ZERO_POINT  # of a byte: code + 128
    if x.tokens <= ROWS_AT_ONCE:
        total = _sum_groups(pixels, x.scales, tensors)
    else:
        pieces = zip(pixels.split(ROWS_AT_ONCE), x.scales.split(ROWS_AT_ONCE), strict=True)
        total = torch.cat([_sum_groups(*piece, tensors) for piece in pieces])
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def _sum_groups(
    pixels: Tensor,  # (T, S, W) uint8
    scales: Tensor,  # (T, S)
    tensors: tuple[Tensor, ...],
) -> Tensor:  # (T, N) float32
    packed, weight_scales, zero_points = tensors
    tokens, groups, _ = pixels.shape
    if not tokens:
        return scales.new_empty((0, weight_scales.shape[0] // groups))
    sums = torch.ops.onednn.qconv2d_pointwise(
        pixels.view(1, tokens, 1, -1).permute(0, 3, 1, 2),
        1.0,
        ZERO_POINT,
        packed,
        weight_scales,
        zero_points,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        groups,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # (1, S * N, T, 1), channels last
    sums = sums.permute(0, 2, 3, 1).view(tokens, groups, -1)
    return sums.mul_(scales.unsqueeze(2)).sum(dim=1)
