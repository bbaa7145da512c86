"""Triton kernel for `norm`: one program normalizes one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Norm
from quatom.ops.norm import rounds_before_weight


@triton.jit
def _norm_kernel(
    x_ptr,  # (T, K)
    residual_ptr,  # (T, K), or x_ptr where there is none
    weight_ptr,  # (K,)
    bias_ptr,  # (K,), or x_ptr where there is none
    total_ptr,  # (T, K), or x_ptr where there is no residual
    out_ptr,  # (T, K)
    x_row_stride,
    residual_row_stride,
    eps,
    K: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,  # round to x's dtype before the weight
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K rounded up to a power of two
):
    token = tl.program_id(0).to(tl.int64)
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
    normed = row * inverse
    if ROUND_FIRST:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_OFFSET != 0.0:
        weight += WEIGHT_OFFSET
    normed *= weight
    if HAS_BIAS:
        normed += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * K + k, normed.to(out_ptr.dtype.element_ty), mask=inside)


def norm_triton(
    x: Tensor, weight: Tensor, norm: Norm, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `norm`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    if tokens:
        _norm_kernel[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            x if bias is None else bias,
            total,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            norm.eps,
            K=channels,
            LAYER=norm.kind == "layer",
            WEIGHT_OFFSET=norm.weight_offset,
            ROUND_FIRST=rounds_before_weight(norm),
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_K=triton.next_power_of_2(channels),
            num_warps=4 if channels <= 2048 else 8,
        )
    return out, total
