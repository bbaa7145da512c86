"""Triton kernel of `expert_linear`: the portable path, sm_80 and later and the CPU interpreter.

A program multiplies BM positions of one expert by BN of its rows. The grid has as many programs as
any routing needs; each finds its expert in the offsets, and those too many end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.experts.routing import TokenGroups
from quatom.ops.linear.triton_product import layout_options, sum_groups, tile_rows

_ROWS = 64
"""BN: output channels of a program."""


@triton.jit(do_not_specialize=["top_k"])
def _experts_kernel(
    x_ptr,  # (rows, K) int8 or floating-point codes
    xs_ptr,  # (rows, S) float32, or x_ptr where activations carry no scales
    w_ptr,  # packed: (E, N, blocks * BK / 2) int8; else (E, N, NORMAL)
    outlier_ptr,  # (E, N, OUTLIERS) int8
    ws_ptr,  # (E, N, S) float32
    bias_ptr,  # (E, N), or ws_ptr where there is none
    slots_ptr,  # (positions,) int32
    offsets_ptr,  # (E + 1,) int32
    y_ptr,  # (positions, N)
    N,
    x_row_stride,
    w_row_stride,
    top_k,
    EXPERTS: tl.constexpr,
    GATHER: tl.constexpr,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    PACKED: tl.constexpr,
    FLOATS: tl.constexpr,
    HAS_XS: tl.constexpr,
    HAS_WS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tl.program_id(1)
    e = tl.arange(0, EXPERT_BLOCK)
    begin = tl.load(offsets_ptr + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + BM - 1) // BM
    tiles_to = tl.cumsum(tiles, 0)  # of all experts up to this one
    expert = tl.sum((tiles_to <= tile).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    own = e == expert
    first = tl.sum(tl.where(own, begin + (tile - tiles_to + tiles) * BM, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)

    p = first + tl.arange(0, BM)
    in_p = p < last
    t = p
    if GATHER:
        t = tl.load(slots_ptr + p, mask=in_p, other=0) // top_k
    t = t.to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_n = n < N
    row = expert.to(tl.int64) * N + n
    ALL_BLOCKS: tl.constexpr = (
        (NORMAL + GROUP_SIZE - 1) // GROUP_SIZE * ((GROUP_SIZE + BK - 1) // BK)
    )
    total = sum_groups(
        x_ptr + t[:, None] * x_row_stride,
        xs_ptr + t * NUM_SCALES,
        w_ptr + row[:, None] * w_row_stride,
        outlier_ptr + row[:, None] * OUTLIERS,
        ws_ptr + row * NUM_SCALES,
        in_p,
        in_n,
        0,
        ALL_BLOCKS,
        True,
        NORMAL, GROUP_SIZE, OUTLIERS, OUTLIER_SIZE, PACKED, FLOATS, HAS_XS, HAS_WS, BM, BN, BK,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + p.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=in_p[:, None] & in_n[None, :])


def experts_triton(
    x: MixedTensor | Tensor,
    tensors: tuple[Tensor, ...],  # of `linear.triton.prepare_triton`, with a leading dimension E
    layout: GroupLayout,
    channels: int,
    bias: Tensor | None,
    groups: TokenGroups,
    top_k: int | None,
) -> Tensor:
    """See `expert_linear`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    weights, outliers, weight_scales = tensors
    is_mixed = isinstance(x, MixedTensor)
    codes = x.codes if is_mixed else x
    if codes.dtype is torch.float32:
        raise BackendError(
            "the Triton expert kernel reads int8, float16 or bfloat16 activations, got float32: "
            "cast them, or use the reference backend"
        )
    y = torch.empty((groups.slots.numel(), channels), dtype=x.dtype, device=codes.device)
    _launch(
        codes,
        x.scales if is_mixed else None,
        weights.view(torch.int8),
        outliers,
        weight_scales,
        bias,
        y,
        groups,
        top_k,
        **layout_options(layout, packed=weights.dtype is torch.uint8),
    )
    return y


def float_experts_triton(
    x: Tensor, weights: Tensor, groups: TokenGroups, top_k: int | None, bias: Tensor | None
) -> Tensor:
    """See `expert_linear`: experts (E, N, K) of x's dtype, float16 or bfloat16."""
    y = x.new_empty((groups.slots.numel(), weights.shape[1]))
    _launch(
        x,
        None,
        weights.contiguous(),
        None,
        None,
        bias,
        y,
        groups,
        top_k,
        NORMAL=weights.shape[2],
        GROUP_SIZE=weights.shape[2],
        OUTLIERS=0,
        OUTLIER_SIZE=1,
        NUM_SCALES=1,
        PACKED=False,
        BK=64,
        num_stages=3,
    )
    return y


def _launch(
    x: Tensor,
    xs: Tensor | None,
    weights: Tensor,
    outliers: Tensor | None,
    weight_scales: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    groups: TokenGroups,
    top_k: int | None,
    **options: int | bool,
) -> None:
    positions, experts = groups.slots.numel(), groups.num_experts
    if not positions:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    bm = tile_rows(positions / experts)
    tiles = positions // bm + min(experts, positions)  # each expert may have one that is not full
    _experts_kernel[(triton.cdiv(y.shape[1], _ROWS), tiles)](
        x,
        x if xs is None else xs,
        weights,
        weights if outliers is None else outliers,
        weights if weight_scales is None else weight_scales,
        weights if bias is None else bias.contiguous(),
        groups.slots,
        groups.offsets,
        y,
        y.shape[1],
        x.stride(0),
        weights.stride(1),
        top_k or 1,
        EXPERTS=experts,
        GATHER=top_k is not None,
        FLOATS=x.dtype is not torch.int8,
        HAS_XS=xs is not None,
        HAS_WS=weight_scales is not None,
        HAS_BIAS=bias is not None,
        EXPERT_BLOCK=triton.next_power_of_2(experts),
        BM=bm,
        BN=_ROWS,
        num_warps=4,
        **options,
    )
