"""Triton kernel for `rope_append_kv`: one program takes a few heads of one token.

Programs of the first kind rotate query heads; those of the second quantize K and V of a block of KV
heads and write codes and pairs into the token's slot. It reads q, k, v once and writes q and, for
INT4, D / 2 + 4 bytes for each of K and V. A head is held as two halves, the channels that rotary
embedding pairs, which are also the two nibbles of a cached byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.groups import MIN_SCALE
from quatom.numerics.hadamard import hadamard_block
from quatom.numerics.kv_pages import KVPages


@triton.jit
def _round_half_even(x):
    # Adding and subtracting 1.5 * 2**23 leaves a float32 rounded the IEEE way for |x| < 2**22,
    # and unlike libdevice.rint it also runs in Triton's CPU interpreter.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _hadamard(x, HEADS: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    # Sums and differences of the lowest channel bit go to the ends of a new highest bit, so that
    # after all bits had their turn the order is that of the reference.
    for _ in tl.static_range(LOG2_DIM):
        even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
        pair = tl.join(even + odd, even - odd)  # (HEADS, DIM / 2, 2)
        x = tl.reshape(tl.permute(pair, (0, 2, 1)), (HEADS, DIM))
    return x


@triton.jit
def _hadamard_halves(
    low,  # (HEADS, HALF_PAD)
    high,
    HEADS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a half that mix, a power of two that divides HALF_PAD
    LOG2_BLOCK: tl.constexpr,
):
    # H of twice the size is [[H, H], [H, -H]]: the halves of the head never mix inside.
    norm: tl.constexpr = (2 * BLOCK) ** -0.5
    ROWS: tl.constexpr = HEADS * HALF_PAD // BLOCK
    a = _hadamard(tl.reshape(low, (ROWS, BLOCK)), ROWS, BLOCK, LOG2_BLOCK)
    b = _hadamard(tl.reshape(high, (ROWS, BLOCK)), ROWS, BLOCK, LOG2_BLOCK)
    a, b = tl.reshape(a, (HEADS, HALF_PAD)), tl.reshape(b, (HEADS, HALF_PAD))
    return (a + b) * norm, (a - b) * norm


@triton.jit
def _codes(x, scale, minimum, LARGEST: tl.constexpr):
    # IEEE division: the contract divides by the stored scale, and an approximate quotient would
    # move ties.
    steps = _round_half_even(tl.div_rn(x - minimum[:, None], scale[:, None] + tl.zeros_like(x)))
    return tl.minimum(tl.maximum(steps, 0.0), LARGEST).to(tl.uint8)


@triton.jit
def _store_row(
    low,  # (HEADS, HALF_PAD) float32
    high,
    rows_ptr,  # (HEADS,) first byte or value of each head's row
    pairs_ptr,  # (HEADS,) float16
    heads_mask,
    half,
    clip_ratio,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    mask = heads_mask[:, None] & (half < HALF)[None, :]
    at = rows_ptr[:, None] + half[None, :]
    if BITS > 8:  # floating-point cache
        tl.store(at, low.to(rows_ptr.dtype.element_ty), mask=mask)
        tl.store(at + HALF, high.to(rows_ptr.dtype.element_ty), mask=mask)
    else:
        LARGEST: tl.constexpr = 2.0**BITS - 1.0
        inside = (half < HALF)[None, :]
        top = tl.where(inside, tl.maximum(low, high), float("-inf"))
        bottom = tl.where(inside, tl.minimum(low, high), float("inf"))
        top, bottom = tl.max(top, axis=1), tl.min(bottom, axis=1)
        margin = (top - bottom) * (0.5 * (1.0 - clip_ratio))
        stored_minimum = tl.minimum(tl.maximum(bottom + margin, -65504.0), 65504.0).to(tl.float16)
        minimum = stored_minimum.to(tl.float32)
        step = tl.div_rn(top - margin - minimum, tl.zeros_like(minimum) + LARGEST)
        stored_scale = tl.minimum(tl.maximum(step, MIN_SCALE), 65504.0).to(tl.float16)
        scale = stored_scale.to(tl.float32)
        tl.store(pairs_ptr, stored_scale, mask=heads_mask)
        tl.store(pairs_ptr + 1, stored_minimum, mask=heads_mask)
        low_codes = _codes(low, scale, minimum, LARGEST)
        high_codes = _codes(high, scale, minimum, LARGEST)
        if BITS == 4:
            tl.store(at, low_codes | (high_codes << 4), mask=mask)
        else:
            tl.store(at, low_codes, mask=mask)
            tl.store(at + HALF, high_codes, mask=mask)


@triton.jit
def _rope_append_kv_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, KV, D)
    v_ptr,  # (T, KV, D)
    cos_ptr,  # (max_position, D / 2) float32
    sin_ptr,
    positions_ptr,  # (T,) int64
    slots_ptr,  # (T,) int64
    rotated_ptr,  # (T, H, D)
    rows_ptr,  # the pages as uint8 codes or floating-point values
    pairs_ptr,  # the pages as float16
    key_offset_ptr,  # (KV, D) float32
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    clip_ratio,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,  # D / 2 rounded up to a power of two
    MIXED: tl.constexpr,  # channels of a half that HADAMARD mixes
    LOG2_MIXED: tl.constexpr,
    S: tl.constexpr,
    ROW: tl.constexpr,  # elements of a cached row, in the units of rows_ptr
    RECORD: tl.constexpr,  # bytes of a block's record of one KV head
    ELEMENT_BYTES: tl.constexpr,  # of rows_ptr
    BITS: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    HADAMARD: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block_h = tl.program_id(1)
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * HALF + half, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=inside, other=0.0)[None, :]

    Q_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    if block_h < Q_BLOCKS:
        head = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < H)[:, None] & inside[None, :]
        at = q_ptr + token * q_token_stride + head[:, None] * q_head_stride + half[None, :]
        low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        new_low, new_high = low * cos - high * sin, high * cos + low * sin
        if HADAMARD:
            new_low, new_high = _hadamard_halves(
                new_low, new_high, BLOCK_H, HALF_PAD, MIXED, LOG2_MIXED
            )
        out = rotated_ptr + (token * H + head[:, None]) * (2 * HALF) + half[None, :]
        tl.store(out, new_low.to(rotated_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, new_high.to(rotated_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            head = (block_h - Q_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
            heads_mask = head < KV
            mask = heads_mask[:, None] & inside[None, :]
            record = ((slot // S) * KV + head) * RECORD  # int64, bytes
            offset = slot % S
            rows = rows_ptr + record // ELEMENT_BYTES + offset * ROW
            pairs = pairs_ptr + (record + 2 * S * ROW * ELEMENT_BYTES) // 2 + offset * 2

            at = k_ptr + token * k_token_stride + head[:, None] * k_head_stride + half[None, :]
            low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            if ROTATE_KEYS:
                new_low, new_high = low * cos - high * sin, high * cos + low * sin
                low, high = new_low, new_high
            if KEY_OFFSET:
                offset_at = key_offset_ptr + head[:, None] * (2 * HALF) + half[None, :]
                low -= tl.load(offset_at, mask=mask, other=0.0)
                high -= tl.load(offset_at + HALF, mask=mask, other=0.0)
            if HADAMARD:
                low, high = _hadamard_halves(low, high, BLOCK_H, HALF_PAD, MIXED, LOG2_MIXED)
            _store_row(low, high, rows, pairs, heads_mask, half, clip_ratio, HALF, BITS, MIN_SCALE)

            at = v_ptr + token * v_token_stride + head[:, None] * v_head_stride + half[None, :]
            low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            rows += S * ROW
            pairs += 2 * S
            _store_row(low, high, rows, pairs, heads_mask, half, clip_ratio, HALF, BITS, MIN_SCALE)


def rope_append_kv_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    pages: KVPages,
    rotated: Tensor,
    rotate_keys_in_cache: bool,
    rotate_kv: bool,
    clip_ratio: float,
    key_offset: Tensor | None,
) -> None:
    """See `rope_append_kv`; writes q into `rotated`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, num_heads, head_dim = q.shape
    if not tokens:
        return
    num_kv_heads, half = pages.num_kv_heads, head_dim // 2
    mixed = hadamard_block(head_dim) // 2
    rows = pages.storage if pages.quantized else pages.storage.view(getattr(torch, pages.dtype))
    block_h = 8
    grid = (tokens, triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h))
    _rope_append_kv_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slot_mapping,
        rotated,
        rows,
        pages.storage.view(torch.float16),
        cos if key_offset is None else key_offset,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        clip_ratio,
        H=num_heads,
        KV=num_kv_heads,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        MIXED=mixed,
        LOG2_MIXED=mixed.bit_length() - 1,
        S=pages.block_size,
        ROW=head_dim * pages.bits // 8 // rows.element_size(),
        RECORD=pages.storage.shape[2],
        ELEMENT_BYTES=rows.element_size(),
        BITS=pages.bits,
        ROTATE_KEYS=rotate_keys_in_cache,
        HADAMARD=rotate_kv,
        KEY_OFFSET=key_offset is not None,
        BLOCK_H=block_h,
        MIN_SCALE=MIN_SCALE,
        num_warps=4,
    )
