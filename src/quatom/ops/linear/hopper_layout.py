"""Weights in the order in which Hopper's matrix unit takes them from registers.

A block is 64 output channels. Its weights are a run of units of 4224 bytes: one for each normal
group (64 channels x 128 INT4 codes) and two for each outlier group (64 x 64 INT8 codes each), 4096
bytes of codes followed by the 64 float16 scales. Groups are padded to 128 channels by zeros.

Inside a unit, bytes are in the order of the 128 threads of a warpgroup, 16 bytes per thread and
half, so that each thread reads its operand registers by two conflict-free 16-byte loads. An INT4
byte holds code + 8 of two channels of the same k, the first eight rows' in the low nibble.

For INT8 activations a normal group's scales are replaced by their multiples of the row's scale
(see `quatom.numerics.multiples`), 16-bit integers, and the scales of all rows are a second tensor.
"""

import torch
from torch import Tensor

from quatom.numerics.groups import GroupLayout
from quatom.numerics.multiples import split_multiples

BLOCK_ROWS = 64
UNIT_BYTES = 4096 + 2 * BLOCK_ROWS


def _row_order() -> list[int]:
    """Channel of a block that is in each operand row.

    A thread of the transposed result then owns four adjacent channels, an 8-byte store.
    """
    low = [4 * (row // 2) + row % 2 for row in range(8)]
    sixteen = low + [row + 2 for row in low]
    return [16 * warp + row for warp in range(4) for row in sixteen]


def pack_weights(
    values: Tensor,  # (N, K) codes in reordered position
    scales: Tensor,  # (N, S)
    layout: GroupLayout,
    *,
    multiples: bool = False,
) -> tuple[Tensor, ...]:
    """Units of all blocks, (ceil(N / 64), G + 2 B, 4224) uint8.

    With `multiples` also the scale of each row, (ceil(N / 64), 64) float32 in the order of a unit's
    scales.

    Raises:
        QuantizationError: scales are no multiples.
    """
    rows = values.shape[0]
    normal = layout.num_normal_groups
    blocks = -(-rows // BLOCK_ROWS)
    padded = values.new_zeros((blocks * BLOCK_ROWS, layout.num_scales, 128), dtype=torch.int8)
    for group, part in enumerate(values.to(torch.int8).split(layout.group_sizes, dim=1)):
        padded[:rows, group, : part.shape[1]] = part
    padded_scales = scales.new_zeros((blocks * BLOCK_ROWS, layout.num_scales), dtype=torch.float16)
    padded_scales[:rows] = scales.to(torch.float16)
    row_scales = scales.new_zeros(blocks * BLOCK_ROWS, dtype=torch.float32)
    if multiples:
        row_scales[:rows], counts = split_multiples(scales[:, :normal])
        padded_scales[:rows, :normal] = counts.to(torch.int16).view(torch.float16)

    order = torch.tensor(_row_order(), device=values.device)
    padded = padded.unflatten(0, (blocks, BLOCK_ROWS))[:, order]
    padded_scales = padded_scales.unflatten(0, (blocks, BLOCK_ROWS))[:, order].transpose(1, 2)
    row_scales = row_scales.unflatten(0, (blocks, BLOCK_ROWS))[:, order]
    codes = torch.cat(
        (_int4_units(padded[:, :, :normal]), _int8_units(padded[:, :, normal:])), dim=1
    )
    unit_scales = torch.cat(
        (padded_scales[:, :normal], padded_scales[:, normal:].repeat_interleave(2, dim=1)), dim=1
    )
    scale_bytes = unit_scales.contiguous().view(torch.uint8)
    packed = torch.cat((codes, scale_bytes), dim=2).contiguous()
    return (packed, row_scales.contiguous()) if multiples else (packed,)


def _int4_units(codes: Tensor) -> Tensor:
    """(blocks, 64, G, 128) int8 -> (blocks, G, 4096) uint8."""
    blocks, _, groups, _ = codes.shape
    # rows: warp, half (of 16 rows), row; channels: chunk pair, chunk, half chunk, thread, byte
    offset = (codes + 8).to(torch.uint8).reshape(blocks, 4, 2, 8, groups, 2, 2, 2, 4, 4)
    low, high = offset.permute(0, 2, 4, 5, 1, 3, 8, 6, 7, 9).unbind(dim=1)
    return (low | (high << 4)).reshape(blocks, groups, 4096)


def _int8_units(codes: Tensor) -> Tensor:
    """(blocks, 64, B, 128) int8 -> (blocks, 2 B, 4096) uint8."""
    blocks, _, groups, _ = codes.shape
    # rows: warp, half, row; channels: half group, chunk, half chunk, thread, byte
    units = codes.reshape(blocks, 4, 2, 8, groups, 2, 2, 2, 4, 4)
    units = units.permute(0, 4, 5, 6, 1, 3, 8, 7, 2, 9)
    return units.reshape(blocks, 2 * groups, 4096).view(torch.uint8)
