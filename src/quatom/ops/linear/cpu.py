"""`linear` on a CPU: exact int8 products of whole groups, scaled and added group by group.

All groups of a layer are one grouped 1x1 convolution of oneDNN: an image of T pixels whose S * W
channels are S groups, with N output channels each, packed weights of one byte, and the weight
scales as the scales of the S * N output channels. Integer dot products are exact whatever order a
library adds them in; the scaled groups add up in float32.

Codes take one byte per weight, a quarter of what the reference holds, and a decode reads them all:
int8 products are 4 to 5 times faster here than float32 ones.

oneDNN 3.11 gives wrong sums, or refuses, for some shapes on CPUs with AMX tiles: seen for 80, 100,
160 and 200 rows and for groups of 96 channels, never for rows in multiples of 64 and groups of 32,
64 or 128 channels. So rows are padded to such a multiple, and every shape is tried once against
exact integers before this backend takes it.
"""

from functools import cache

import torch
from torch import Tensor

from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor

ROWS_AT_ONCE = 32
"""Rows whose sums of all groups are held at once: more drop out of a core's cache."""
ZERO_POINT = 128
"""oneDNN multiplies unsigned by signed bytes: activations go in as code + 128."""
ROW_BLOCK = 64
"""Rows are padded to a multiple of this."""
_TRIED_TOKENS = (1, 2, 7, ROWS_AT_ONCE)
"""Numbers of tokens that a shape is tried with: oneDNN picks its kernel by them."""


def cpu_obstacle(values: Tensor, layout: GroupLayout, formats: tuple[str, ...]) -> str | None:
    """Why this backend cannot run weights `values` in these formats, or None if it can."""
    if values.device.type != "cpu":
        return f"it runs on a CPU, the weights are on {values.device}"
    wrong = [name for name in formats if not name.startswith("int")]
    if wrong:
        return f"it multiplies integers of at most 8 bits, not {' and '.join(wrong)}"
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        # Without these instructions oneDNN adds pairs of products in 16 bits, which saturate.
        return "it needs a CPU with AVX-512 VNNI, and oneDNN, for exact int8 products"
    rows, groups, width = values.shape[0], layout.num_scales, max(layout.group_sizes)
    if not multiplies_exactly(_padded_rows(rows), groups, width, torch.get_num_threads()):
        return (
            f"oneDNN of torch {torch.__version__} multiplies {rows} rows of {groups} groups of "
            f"{width} channels wrongly on this CPU"
        )
    return None


@cache
def multiplies_exactly(rows: int, groups: int, width: int, threads: int) -> bool:
    """Whether int8 products of one shape are those of exact integers, on this CPU.

    Args:
        rows: output rows, padded.
        groups: groups of the layout.
        width: channels of the widest group.
        threads: torch's threads, among which oneDNN divides the work.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (groups, rows, width)
    weights = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    ones = torch.ones(groups * rows)
    try:
        tensors = (_pack(weights, ones), ones, torch.zeros_like(ones, dtype=torch.int32))
        for tokens in _TRIED_TOKENS:
            codes = torch.randint(-128, 128, (tokens, groups, width), generator=generator)
            pixels = (codes + ZERO_POINT).to(torch.uint8)
            got = _group_sums(pixels, tensors)
            # At most 127 * 128 * 128 channels: below 2**24, so float32 holds the sums exactly.
            # One group at a time: all weights in float32 would take four times their own memory.
            for group in range(groups):
                want = codes[:, group].float() @ weights[group].float().t()
                if not torch.equal(got[:, group], want):
                    return False
    except RuntimeError:  # oneDNN finds no kernel for the shape
        return False
    return True


def _padded_rows(rows: int) -> int:
    return -(-rows // ROW_BLOCK) * ROW_BLOCK


def prepare_cpu(values: Tensor, scales: Tensor, layout: GroupLayout) -> tuple[Tensor, ...]:
    """Codes as oneDNN packs them, scales and zero points: (S * N,) float32 and int32."""
    rows, sizes = values.shape[0], layout.group_sizes
    padded = values.new_zeros((len(sizes), _padded_rows(rows), max(sizes)), dtype=torch.int8)
    for group, part in zip(padded, values.split(sizes, dim=1), strict=True):
        group[:rows, : part.shape[1]] = part
    weight_scales = scales.new_zeros((len(sizes), _padded_rows(rows)), dtype=torch.float32)
    weight_scales[:, :rows] = scales.t()
    weight_scales = weight_scales.flatten()
    packed = _pack(padded, weight_scales)
    return packed, weight_scales, torch.zeros_like(weight_scales, dtype=torch.int32)


def _pack(
    padded: Tensor,  # (S, N, W) int8
    weight_scales: Tensor,  # (S * N,)
) -> Tensor:
    groups, _, width = padded.shape
    return torch.ops.onednn.qconv_prepack(
        padded.view(-1, width, 1, 1),
        weight_scales,
        1.0,
        ZERO_POINT,
        [1, 1],
        [0, 0],
        [1, 1],
        groups,
        None,
    )


def linear_cpu(
    x: MixedTensor, tensors: tuple[Tensor, ...], out_channels: int, bias: Tensor | None
) -> Tensor:
    """See `linear`; x has integer codes in the `padded` layout."""
    pixels = x.codes.view(torch.uint8) ^ ZERO_POINT  # of a byte: code + 128
    if x.tokens <= ROWS_AT_ONCE:
        total = _sum_groups(pixels, x.scales, tensors)
    else:
        pieces = zip(pixels.split(ROWS_AT_ONCE), x.scales.split(ROWS_AT_ONCE), strict=True)
        total = torch.cat([_sum_groups(*piece, tensors) for piece in pieces])
    total = total[:, :out_channels]
    return (total if bias is None else total + bias).to(x.dtype)


def _sum_groups(
    pixels: Tensor,  # (T, S, W) uint8
    scales: Tensor,  # (T, S)
    tensors: tuple[Tensor, ...],
) -> Tensor:  # (T, N) float32
    tokens, groups, _ = pixels.shape
    if not tokens:
        return scales.new_empty((0, tensors[1].shape[0] // groups))
    return _group_sums(pixels, tensors).mul_(scales.unsqueeze(2)).sum(dim=1)


def _group_sums(
    pixels: Tensor,  # (T, S, W) uint8
    tensors: tuple[Tensor, ...],
) -> Tensor:  # (T, S, N) float32, times the weights' scales
    packed, weight_scales, zero_points = tensors
    tokens, groups, _ = pixels.shape
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
    return sums.permute(0, 2, 3, 1).view(tokens, groups, -1)
