"""Triton kernel for `head_norm`: a program takes a few heads of one token, or all of q or of k."""

import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import HeadNormAxis, Norm
from quatom.ops.norm import rounds_before_weight

_HEADS = 8
"""Heads of a program that normalizes each by itself."""


@triton.jit
def _normalize(
    x_ptr,  # heads of one token
    head_stride,
    out_ptr,  # the same heads, contiguous
    weight_ptr,  # (WIDTH,), or (COUNT, WIDTH) where each row has its own
    first,  # row of the first one below
    eps,
    EACH: tl.constexpr,  # each row has a weight of its own
    COUNT: tl.constexpr,  # rows of the token
    WIDTH: tl.constexpr,  # channels that are normalized together
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH_PAD)
    inside = (column < WIDTH)[None, :]
    mask = (row < COUNT)[:, None] & inside
    if WIDTH == D:
        at = row[:, None] * head_stride + column[None, :]
    else:
        at = (row * 0)[:, None] + (column // D * head_stride + column % D)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / WIDTH + eps)
    normed = x * inverse[:, None]
    if ROUND_FIRST:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    if EACH:
        weight_at = row[:, None] * WIDTH + column[None, :]
        weight = tl.load(weight_ptr + weight_at, mask=mask, other=0.0).to(tl.float32)
    else:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if WEIGHT_OFFSET != 0.0:
        weight += WEIGHT_OFFSET
    if not EACH:
        weight = weight[None, :]
    out = out_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(out, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_norm_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, KV, D)
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,  # (T, H + KV, D)
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    eps,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    ALL: tl.constexpr,  # the heads of a token are normalized together
    EACH: tl.constexpr,  # each head has a weight of its own
    ROWS: tl.constexpr,  # that a program normalizes
    Q_PAD: tl.constexpr,  # channels of a row of q, and of k, rounded up to powers of two
    K_PAD: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    Q_COUNT: tl.constexpr = 1 if ALL else H
    K_COUNT: tl.constexpr = 1 if ALL else KV
    Q_WIDTH: tl.constexpr = H * D if ALL else D
    K_WIDTH: tl.constexpr = KV * D if ALL else D
    Q_BLOCKS: tl.constexpr = (Q_COUNT + ROWS - 1) // ROWS
    out_ptr += token * (H + KV) * D
    if block < Q_BLOCKS:
        _normalize(
            q_ptr + token * q_token_stride,
            q_head_stride,
            out_ptr,
            q_weight_ptr,
            block * ROWS,
            eps,
            EACH,
            Q_COUNT,
            Q_WIDTH,
            D,
            ROWS,
            Q_PAD,
            LAYER,
            WEIGHT_OFFSET,
            ROUND_FIRST,
        )
    else:
        _normalize(
            k_ptr + token * k_token_stride,
            k_head_stride,
            out_ptr + H * D,
            k_weight_ptr,
            (block - Q_BLOCKS) * ROWS,
            eps,
            EACH,
            K_COUNT,
            K_WIDTH,
            D,
            ROWS,
            K_PAD,
            LAYER,
            WEIGHT_OFFSET,
            ROUND_FIRST,
        )


def head_norm_triton(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norm: Norm, axis: HeadNormAxis
) -> tuple[Tensor, Tensor]:
    """See `head_norm`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    out = q.new_empty(tokens, heads + kv_heads, head_dim)
    if tokens:
        together = axis == "all"
        rows = 1 if together else _HEADS
        blocks = 2 if together else triton.cdiv(heads, rows) + triton.cdiv(kv_heads, rows)
        _head_norm_kernel[(tokens, blocks)](
            q,
            k,
            q_weight,
            k_weight,
            out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            norm.eps,
            H=heads,
            KV=kv_heads,
            D=head_dim,
            ALL=together,
            EACH=axis == "each",
            ROWS=rows,
            Q_PAD=triton.next_power_of_2(heads * head_dim if together else head_dim),
            K_PAD=triton.next_power_of_2(kv_heads * head_dim if together else head_dim),
            LAYER=norm.kind == "layer",
            WEIGHT_OFFSET=norm.weight_offset,
            ROUND_FIRST=rounds_before_weight(norm),
            num_warps=4,
        )
    new_q, new_k = out.split((heads, kv_heads), dim=1)
    return new_q, new_k
