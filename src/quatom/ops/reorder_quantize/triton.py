"""Triton kernel for `reorder_quantize`: one program reorders and quantizes one token.

The row is read once, in order; channels are gathered in shared memory (`tl.gather`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.triton_quantize import (
    allocate,
    group_bounds,
    group_width,
    quantize_options,
    store_groups,
)


@triton.jit
def _reorder_quantize_kernel(
    x_ptr,  # (T, K)
    order_ptr,  # (K,) int32, or x_ptr where there is no order
    codes_ptr,
    scales_ptr,
    x_row_stride,
    tokens_padded,
    clip_ratio,
    normal_largest,
    outlier_largest,
    MIN_SCALE: tl.constexpr,
    NORMAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    NORMAL_KIND: tl.constexpr,
    OUTLIER_KIND: tl.constexpr,
    GROUPS_LAYOUT: tl.constexpr,
    ROTATE_STAGES: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K rounded up to a power of two
    SB: tl.constexpr,  # S rounded up to a power of two
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # T * K overflows int32 on long prefills
    s = tl.arange(0, SB)
    column = tl.arange(0, WIDTH)
    first, end = group_bounds(s, NORMAL, GROUP_SIZE, OUTLIER_SIZE)
    channel = first[:, None] + column[None, :]
    mask = (channel < end[:, None]) & (s < NUM_SCALES)[:, None]
    x_row_ptr = x_ptr + token * x_row_stride
    if HAS_ORDER:
        k = tl.arange(0, BLOCK_K)
        row = tl.load(x_row_ptr + k, mask=k < NORMAL + OUTLIERS, other=0.0).to(tl.float32)
        source = tl.load(order_ptr + channel, mask=mask, other=0)
        x = tl.gather(row, tl.reshape(source, (SB * WIDTH,)), axis=0)
        x = tl.where(mask, tl.reshape(x, (SB, WIDTH)), 0.0)
    else:
        x = tl.load(x_row_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    store_groups(
        x,
        s,
        column,
        token,
        codes_ptr,
        scales_ptr,
        tokens_padded,
        clip_ratio,
        normal_largest,
        outlier_largest,
        MIN_SCALE,
        NORMAL,
        GROUP_SIZE,
        OUTLIERS,
        OUTLIER_SIZE,
        NUM_SCALES,
        NORMAL_KIND,
        OUTLIER_KIND,
        GROUPS_LAYOUT,
        ROTATE_STAGES,
        SCALE_MODE,
    )


def reorder_quantize_triton(x: Tensor, order: Tensor | None, spec: QuantizeSpec) -> MixedTensor:
    """See `reorder_quantize`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, channels = x.shape
    out = allocate(x, tokens, spec)
    if not tokens:
        return out
    options = quantize_options(spec)
    width = group_width(spec)
    _reorder_quantize_kernel[(tokens,)](
        x,
        x if order is None else order.to(torch.int32),
        out.codes,
        out.scales,
        x.stride(0),
        out.codes.shape[1],
        HAS_ORDER=order is not None,
        BLOCK_K=triton.next_power_of_2(channels),
        SB=triton.next_power_of_2(spec.layout.num_scales),
        WIDTH=width,
        num_warps=4 if channels <= 2048 else 8,
        **options,
    )
    return out
