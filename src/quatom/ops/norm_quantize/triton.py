"""Triton kernel for `norm_quantize`: one program normalizes and quantizes one token.

The row, its residual and the norm's weight are read once, in order; channels are gathered in
shared memory (`tl.gather`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Norm
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.triton_quantize import (
    allocate,
    group_bounds,
    group_width,
    quantize_options,
    store_groups,
)


@triton.jit
def _norm_quantize_kernel(
    x_ptr,  # (T, K)
    residual_ptr,  # (T, K), or x_ptr where there is none
    weight_ptr,  # (K,)
    bias_ptr,  # (K,), or x_ptr where there is none
    order_ptr,  # (K,) int32, or x_ptr where there is no order
    total_ptr,  # (T, K), or x_ptr where there is no residual
    codes_ptr,
    scales_ptr,
    x_row_stride,
    residual_row_stride,
    tokens_padded,
    eps,
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
    LAYER: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K rounded up to a power of two
    SB: tl.constexpr,  # S rounded up to a power of two
    WIDTH: tl.constexpr,
):
    K: tl.constexpr = NORMAL + OUTLIERS
    token = tl.program_id(0).to(tl.int64)  # T * K overflows int32 on long prefills
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    row = tl.load(x_ptr + token * x_row_stride + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * residual_row_stride + k, mask=inside, other=0.0)
        rounded = (row + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + token * K + k, rounded, mask=inside)
        row = rounded.to(tl.float32)
    if LAYER:
        row = tl.where(inside, row - tl.sum(row, axis=0) / K, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(row * row, axis=0) / K + eps)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_OFFSET != 0.0:
        weight += WEIGHT_OFFSET
    normed = row * inverse * weight
    if HAS_BIAS:
        normed += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)

    s = tl.arange(0, SB)
    column = tl.arange(0, WIDTH)
    first, end = group_bounds(s, NORMAL, GROUP_SIZE, OUTLIER_SIZE)
    channel = first[:, None] + column[None, :]
    mask = (channel < end[:, None]) & (s < NUM_SCALES)[:, None]
    if HAS_ORDER:
        source = tl.load(order_ptr + channel, mask=mask, other=0)
    else:
        source = tl.where(mask, channel, 0)
    x = tl.gather(normed, tl.reshape(source, (SB * WIDTH,)), axis=0)
    x = tl.where(mask, tl.reshape(x, (SB, WIDTH)), 0.0)
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


def norm_quantize_triton(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    norm: Norm,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[MixedTensor, Tensor]:
    """See `norm_quantize`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, channels = x.shape
    out = allocate(x, tokens, spec)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if not tokens:
        return out, total
    _norm_quantize_kernel[(tokens,)](
        x,
        x if residual is None else residual,
        weight,
        x if bias is None else bias,
        x if order is None else order.to(torch.int32),
        total,
        out.codes,
        out.scales,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.codes.shape[1],
        norm.eps,
        LAYER=norm.kind == "layer",
        WEIGHT_OFFSET=norm.weight_offset,
        HAS_BIAS=bias is not None,
        HAS_ORDER=order is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_K=triton.next_power_of_2(channels),
        SB=triton.next_power_of_2(spec.layout.num_scales),
        WIDTH=group_width(spec),
        num_warps=4 if channels <= 2048 else 8,
        **quantize_options(spec),
    )
    return out, total
