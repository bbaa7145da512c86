"""Triton kernels of `group_tokens` and `combine`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024
"""Slots of a program of `group_tokens`, where there are more than of one."""
_ONE_CHUNK = 4096
"""So many slots are one program's: one launch less, which is faster up to here."""
_TILE = 1024
"""Channels of a program of `combine`."""


@triton.jit(do_not_specialize=["COUNT"])  # steps of every length run one variant
def _count_kernel(
    ids_ptr,  # (COUNT,)
    counts_ptr,  # (E, chunks) int32
    COUNT,
    BLOCK: tl.constexpr,
):
    """A program counts the slots of one expert in one chunk."""
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + slot, mask=slot < COUNT, other=-1)
    own = tl.sum((ids == tl.program_id(0)).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), own)


@triton.jit(do_not_specialize=["COUNT"])
def _place_kernel(
    ids_ptr,  # (COUNT,)
    counts_ptr,  # (E, chunks) int32; not read where there is one chunk
    slots_ptr,  # (COUNT,) int32
    offsets_ptr,  # (E + 1,) int32
    positions_ptr,  # (COUNT,) int32
    COUNT,
    ONE_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program places the slots of one expert in one chunk after all that come before them."""
    expert = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = chunk * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + slot, mask=slot < COUNT, other=tl.num_programs(0))
    if ONE_CHUNK:
        first = tl.sum((ids < expert).to(tl.int32), 0)
    else:
        before = tl.zeros((BLOCK,), dtype=tl.int32)
        end = expert * tl.num_programs(1) + chunk
        for start in range(0, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            before += tl.load(counts_ptr + at, mask=at < end, other=0)
        first = tl.sum(before, 0)
    if chunk == 0:
        tl.store(offsets_ptr + expert, first)
        if expert == tl.num_programs(0) - 1:
            tl.store(offsets_ptr + expert + 1, COUNT)
    own = (ids == expert).to(tl.int32)
    position = first + tl.cumsum(own, 0) - 1
    tl.store(slots_ptr + position, slot, mask=own > 0)
    tl.store(positions_ptr + slot, position, mask=own > 0)


def group_triton(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `group_tokens`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    count = expert_ids.numel()
    slots, positions = (expert_ids.new_empty(count, dtype=torch.int32) for _ in range(2))
    offsets = expert_ids.new_empty(num_experts + 1, dtype=torch.int32)
    chunk = _ONE_CHUNK if _CHUNK < count <= _ONE_CHUNK else _CHUNK
    grid = num_experts, max(1, triton.cdiv(count, chunk))
    counts = offsets
    if grid[1] > 1:
        counts = expert_ids.new_empty(grid, dtype=torch.int32)
        _count_kernel[grid](expert_ids, counts, count, BLOCK=chunk, num_warps=4)
    _place_kernel[grid](
        expert_ids,
        counts,
        slots,
        offsets,
        positions,
        count,
        ONE_CHUNK=grid[1] == 1,
        BLOCK=chunk,
        num_warps=chunk // 256,
    )
    return slots, offsets, positions


@triton.jit
def _combine_kernel(
    y_ptr,  # (T K, CHANNELS)
    positions_ptr,  # (T K,) int32
    weights_ptr,  # (T, K) float32
    out_ptr,  # (T, CHANNELS)
    y_row_stride,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = channel < CHANNELS
    total = tl.zeros((TILE,), dtype=tl.float32)
    for j in tl.static_range(K):  # a fixed order
        row = tl.load(positions_ptr + token * K + j).to(tl.int64)
        y = tl.load(y_ptr + row * y_row_stride + channel, mask=inside, other=0.0)
        total += y.to(tl.float32) * tl.load(weights_ptr + token * K + j)
    at = out_ptr + token * CHANNELS + channel
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine_triton(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """See `combine`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    (tokens, k), channels = weights.shape, y.shape[1]
    out = y.new_empty((tokens, channels))
    if y.stride(1) != 1:
        y = y.contiguous()
    if tokens:
        _combine_kernel[(tokens, triton.cdiv(channels, _TILE))](
            y,
            positions,
            weights.contiguous(),
            out,
            y.stride(0),
            K=k,
            CHANNELS=channels,
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=False,  # products are rounded before they are added
        )
    return out
