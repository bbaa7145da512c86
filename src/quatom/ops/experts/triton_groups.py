"""Triton kernels of `group_tokens` and `combine`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.ops.triton_launch import overlaps, wait_for_the_kernel_before

_ONE_CHUNK = 4096
"""Slots up to which a program of `group_tokens` sees all of them."""
_CHUNK = 1024
"""Slots of a program where there are more; kernels that count come first."""
_SCAN = 4096
"""Counts that are added up at once."""
_TILE = 1024
"""Channels of a program of `combine`."""


@triton.jit(do_not_specialize=["COUNT"])  # steps of every length run one variant
def _count_kernel(
    ids_ptr,  # (COUNT,)
    counts_ptr,  # (E, chunks) int32
    COUNT,
    E: tl.constexpr,
    BINS: tl.constexpr,  # a power of two above E
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """A program counts the slots of each expert in one chunk."""
    wait_for_the_kernel_before(launch_pdl)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(tl.load(ids_ptr + slot, mask=slot < COUNT, other=E), BINS)
    expert = tl.arange(0, BINS)
    at = counts_ptr + expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, counts, mask=expert < E)


@triton.jit(do_not_specialize=["COUNT"])
def _scan_kernel(
    counts_ptr,  # (COUNT,) int32: replaced by the sum of those before each
    COUNT,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_the_kernel_before(launch_pdl)
    total = 0
    for start in range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + at, mask=at < COUNT, other=0)
        tl.store(counts_ptr + at, total + tl.cumsum(counts, 0) - counts, mask=at < COUNT)
        total += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["COUNT"])
def _place_kernel(
    ids_ptr,  # (COUNT,)
    firsts_ptr,  # (E, chunks) int32; not read where there is one chunk
    slots_ptr,  # (COUNT,) int32
    offsets_ptr,  # (E + 1,) int32
    positions_ptr,  # (COUNT,) int32
    COUNT,
    ONE_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """A program places the slots of one expert in one chunk after all that come before them."""
    wait_for_the_kernel_before(launch_pdl)
    expert = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = chunk * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + slot, mask=slot < COUNT, other=tl.num_programs(0))
    if ONE_CHUNK:
        first = tl.sum((ids < expert).to(tl.int32), 0)
    else:
        first = tl.load(firsts_ptr + expert * tl.num_programs(1) + chunk)
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
    one_chunk = count <= _ONE_CHUNK
    chunk = _CHUNK if count <= _CHUNK or not one_chunk else _ONE_CHUNK
    chunks = max(1, triton.cdiv(count, chunk))
    firsts, launch_pdl = offsets, overlaps(expert_ids)
    if not one_chunk:
        firsts = expert_ids.new_empty((num_experts, chunks), dtype=torch.int32)
        bins = triton.next_power_of_2(num_experts + 1)
        _count_kernel[(chunks,)](
            expert_ids,
            firsts,
            count,
            E=num_experts,
            BINS=bins,
            BLOCK=chunk,
            launch_pdl=launch_pdl,
            num_warps=4,
        )
        _scan_kernel[(1,)](firsts, firsts.numel(), BLOCK=_SCAN, launch_pdl=launch_pdl, num_warps=16)
    _place_kernel[(num_experts, chunks)](
        expert_ids,
        firsts,
        slots,
        offsets,
        positions,
        count,
        ONE_CHUNK=one_chunk,
        BLOCK=chunk,
        launch_pdl=launch_pdl,
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
    launch_pdl: tl.constexpr,
):
    wait_for_the_kernel_before(launch_pdl)
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
            launch_pdl=overlaps(y),
            num_warps=4,
            enable_fp_fusion=False,  # products are rounded before they are added
        )
    return out
