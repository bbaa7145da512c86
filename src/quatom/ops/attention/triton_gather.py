# mypy: ignore-errors
"""Triton kernel that dequantizes the blocks of a batch into packed, contiguous K and V."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.kv_pages import KVPages


# What changes from step to step: a stride, and where a mixed batch's prefills begin in its tables.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "lens_ptr"],
)
def _gather_kernel(
    rows_ptr,  # the pages as uint8 codes or floating-point values
    pairs_ptr,  # the pages as float16
    table_ptr,  # (B, max_blocks) int32
    starts_ptr,  # (B + 1,) int32, prefix sums of gathered tokens
    lens_ptr,  # (B,) int32, cached tokens of each sequence
    k_ptr,  # (total, KV, OUT)
    v_ptr,  # (total, KV, OUT)
    cos_ptr,  # (max_position, D / 2) float32, read when KEY_ROTARY
    sin_ptr,
    table_stride,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    S: tl.constexpr,
    ROW: tl.constexpr,  # elements of a cached row, in the units of rows_ptr
    RECORD: tl.constexpr,  # bytes of a block's record of one KV head
    ELEMENT_BYTES: tl.constexpr,  # of rows_ptr
    BITS: tl.constexpr,
    KEY_ROTARY: tl.constexpr,
    LAST: tl.constexpr,  # only the last tokens of a sequence are gathered
    OUT: tl.constexpr,  # channels of an output row: D and zeros
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2)
    first = tl.load(starts_ptr + batch)
    count = tl.load(starts_ptr + batch + 1) - first
    index = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    stored = index < count
    token = index
    if LAST:
        token += tl.load(lens_ptr + batch) - count
    half = tl.arange(0, HALF_PAD)
    mask = stored[:, None] & (half < HALF)[None, :]
    block = tl.load(table_ptr + batch * table_stride + token // S, mask=stored, other=0)
    record = (block.to(tl.int64) * KV + kv_head) * RECORD
    rows = rows_ptr + record // ELEMENT_BYTES + (token % S) * ROW
    pairs = pairs_ptr + (record + 2 * S * ROW * ELEMENT_BYTES) // 2 + (token % S) * 2
    target = ((first + index).to(tl.int64) * KV + kv_head) * OUT
    for which in tl.static_range(2):
        at = rows[:, None] + which * S * ROW + half[None, :]
        out_ptr = v_ptr if which else k_ptr
        out = out_ptr + target[:, None] + half[None, :]
        if BITS == 4:
            packed = tl.load(at, mask=mask, other=0)
            low, high = (packed & 0xF).to(tl.float32), (packed >> 4).to(tl.float32)
        else:
            low = tl.load(at, mask=mask, other=0).to(tl.float32)
            high = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
        if BITS <= 8:
            scale = tl.load(pairs + which * 2 * S, mask=stored, other=0.0).to(tl.float32)
            minimum = tl.load(pairs + which * 2 * S + 1, mask=stored, other=0.0).to(tl.float32)
            low = low * scale[:, None] + minimum[:, None]
            high = high * scale[:, None] + minimum[:, None]
        if KEY_ROTARY and which == 0:
            angle = token[:, None] * HALF + half[None, :]
            cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
            turned = low * cos - high * sin
            high = high * cos + low * sin
            low = turned
        tl.store(out, low.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)
        if OUT > 2 * HALF:
            column = 2 * HALF + half
            zeros = tl.zeros((BLOCK_T, HALF_PAD), out_ptr.dtype.element_ty)
            beyond = stored[:, None] & (column < OUT)[None, :]
            tl.store(out_ptr + target[:, None] + column[None, :], zeros, mask=beyond)


def gather_triton(
    pages: KVPages,
    block_tables: Tensor,  # (B, max_blocks) int32
    cu_seqlens_k: Tensor,  # (B + 1,) int32, prefix sums of the tokens to gather
    total: int,
    most: int,
    dtype: torch.dtype,
    rotary: tuple[Tensor, Tensor] | None = None,  # cos, sin: rotate K by its token's position
    *,
    seq_lens: Tensor | None = None,  # (B,) int32, all cached tokens, where not all are gathered
    padding: int = 0,
) -> tuple[Tensor, Tensor]:
    """Dequantized K and V of the last tokens of all sequences, of `dtype`.

    Args:
        total: tokens of the result, at least as many as are gathered.
        most: an upper bound of the tokens that are gathered of a sequence.
        seq_lens: None where all tokens are gathered.
        padding: channels that are added to each head, zeros.

    Returns:
        two (total, KV, D + padding) tensors.
    """
    num_kv_heads, head_dim = pages.num_kv_heads, pages.head_dim
    k, v = torch.empty(
        (2, total, num_kv_heads, head_dim + padding), dtype=dtype, device=pages.storage.device
    ).unbind()
    rows = pages.storage if pages.quantized else pages.storage.view(getattr(torch, pages.dtype))
    block_t = 32
    batch = cu_seqlens_k.shape[0] - 1
    _gather_kernel[(triton.cdiv(most, block_t), batch, num_kv_heads)](
        rows,
        pages.storage.view(torch.float16),
        block_tables,
        cu_seqlens_k,
        cu_seqlens_k if seq_lens is None else seq_lens,
        k,
        v,
        k if rotary is None else rotary[0],
        k if rotary is None else rotary[1],
        block_tables.stride(0),
        KV=num_kv_heads,
        HALF=head_dim // 2,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        S=pages.block_size,
        ROW=head_dim * pages.bits // 8 // rows.element_size(),
        RECORD=pages.storage.shape[2],
        ELEMENT_BYTES=rows.element_size(),
        BITS=pages.bits,
        KEY_ROTARY=rotary is not None,
        LAST=seq_lens is not None,
        OUT=head_dim + padding,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return k, v
