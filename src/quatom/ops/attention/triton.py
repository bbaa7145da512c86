"""Triton kernel for `attention`, decode and prefill, over any cache format.

One program takes a tile of query rows of one KV head (row = new token * G + head of the group, so
that grouped heads share every loaded K and V) and walks the tokens it sees in tiles of BLOCK_T:

    S  = (Q C_k^T) * scale_k + (sum of Q) * minimum_k      (C: codes)
    O += (P * scale_v) C_v + sum of P * minimum_v

Scale and minimum meet S and P, once per token, instead of every element. A head is two halves, the
nibbles of a byte. For 16-bit queries a code n is not converted either: its bits, taken as a
float16, are the subnormal n * 2**-24 (n * 2**-20 for a high nibble left in its place), which
tensor cores multiply exactly. With splits > 1 programs leave partial results to a second kernel,
which merges them in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences, seen_tokens
from quatom.ops.cuda_build import multiprocessors

_LOG2E = 1.4426950408889634


@triton.jit
def _load_halves(
    rows,
    half,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BITS: tl.constexpr,
    PTX: tl.constexpr,
    dtype: tl.constexpr,
):
    """Low and high half of rows (BLOCK_T,): values, or codes as values or subnormals of dtype."""
    at = rows[:, None] + half[None, :]
    if HALF == HALF_PAD:
        first = tl.load(at)
        second = first if BITS == 4 else tl.load(at + HALF)
    else:
        inside = (half < HALF)[None, :]
        first = tl.load(at, mask=inside, other=0)
        second = first if BITS == 4 else tl.load(at + HALF, mask=inside, other=0)
    if PTX and BITS == 4 and dtype == tl.float16:
        # What the lines below mean, four bytes at a time: left to itself the compiler takes them
        # apart one by one, at more than twice the instructions.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            and.b32 t, $4, 0x0F0F0F0F;
            prmt.b32 $0, t, 0, 0x4140;
            prmt.b32 $1, t, 0, 0x4342;
            and.b32 t, $4, 0xF0F0F0F0;
            prmt.b32 $2, t, 0, 0x4140;
            prmt.b32 $3, t, 0, 0x4342;
            }""",
            "=r,=r,=r,=r,r",
            [first],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    if BITS <= 8 and dtype == tl.float16:
        low, high = first.to(tl.uint16), second.to(tl.uint16)
        if BITS == 4:
            low, high = low & 0xF, high & 0xF0
        return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
    if BITS == 4:
        return (first & 0xF).to(dtype), (second >> 4).to(dtype)
    return first.to(dtype), second.to(dtype)


@triton.jit
def share_beside_sink(total, maximum, sink):
    """What outputs in units of 2**maximum are multiplied by: 1 / (weights' sum and the sink's)."""
    logit = sink * 1.4426950408889634
    shift = tl.maximum(maximum, logit)
    unit = tl.exp2(maximum - shift)  # 0 where nothing is seen
    return unit / (total * unit + tl.exp2(logit - shift))


# How many splits a batch takes and how wide its block tables are changes from step to step: a
# variant of the kernel for each would be compiled in the middle of serving. So does where a mixed
# batch's prefills begin in its tables.
@triton.jit(
    do_not_specialize=["table_stride", "splits"],
    do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "lens_ptr"],
)
def _attention_kernel(
    q_ptr,  # (T, H, D)
    out_ptr,  # (T, H, D); written unless SPLIT
    partial_ptr,  # (T, H, splits, D) float32
    stats_ptr,  # (T, H, splits, 2) float32: maximum (log2), sum
    rows_ptr,  # the pages as uint8 codes or floating-point values
    pairs_ptr,  # the pages as float16
    table_ptr,  # (B, max_blocks) int32
    starts_ptr,  # (B + 1,) int32
    lens_ptr,  # (B,) int32
    cos_ptr,  # (max_position, D / 2) float32, read when KEY_ROTARY
    sin_ptr,
    sinks_ptr,  # (H,) float32, read when SINKS
    table_stride,
    splits,
    q_stride,
    score_scale,  # softmax_scale * log2(e), or softmax_scale / softcap
    softcap_log2e,
    window,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    S: tl.constexpr,
    ROW: tl.constexpr,  # elements of a cached row, in the units of rows_ptr
    RECORD: tl.constexpr,  # bytes of a block's record of one KV head
    ELEMENT_BYTES: tl.constexpr,  # of rows_ptr
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,  # splits > 1
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    KEY_ROTARY: tl.constexpr,
    PTX: tl.constexpr,  # inline assembly may be used: NVIDIA, and not the interpreter
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALIGN: tl.constexpr,  # gcd(S, BLOCK_T): no block that lies before the window is read
):
    G: tl.constexpr = H // KV
    kv_head = tl.program_id(1)
    batch = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    first_q = tl.load(starts_ptr + batch)
    new_tokens = tl.load(starts_ptr + batch + 1) - first_q
    length = tl.load(lens_ptr + batch)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= new_tokens * G:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    new_token = row // G
    head = kv_head * G + row % G
    row_mask = new_token < new_tokens
    position = length - new_tokens + new_token  # -1 and below see nothing
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    q_mask = row_mask[:, None] & inside[None, :]
    q_row = (first_q + new_token).to(tl.int64)
    q_at = q_ptr + q_row[:, None] * q_stride + head[:, None] * (2 * HALF) + half[None, :]
    q_low = tl.load(q_at, mask=q_mask, other=0.0)
    q_high = tl.load(q_at + HALF, mask=q_mask, other=0.0)
    SUBNORMAL: tl.constexpr = BITS <= 8 and q_ptr.dtype.element_ty != tl.float32
    dtype: tl.constexpr = tl.float16 if SUBNORMAL else q_ptr.dtype.element_ty
    # What a low and a high code of 1 must be multiplied by to be 1.
    LOW_UNIT: tl.constexpr = 2.0**24 if SUBNORMAL else 1.0
    HIGH_UNIT: tl.constexpr = 2.0**20 if SUBNORMAL and BITS == 4 else LOW_UNIT
    if BITS <= 8:
        a, b = q_low.to(tl.float32), q_high.to(tl.float32)
        q_sum = tl.sum(a + b, axis=1) * score_scale
        factor = tl.full((BLOCK_M,), score_scale, tl.float32)
    if SUBNORMAL:
        # A power of two brings each row to between 2**10 and 2**11, where neither it nor the
        # sixteenth that meets high nibbles loses bits in float16.
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1)
        field = 264 - (largest.to(tl.int32, bitcast=True) >> 23)
        field = tl.minimum(tl.maximum(field, 1), 253)
        up = (field << 23).to(tl.float32, bitcast=True)
        down = ((254 - field) << 23).to(tl.float32, bitcast=True)
        if KEY_ROTARY:
            factor *= down
        else:
            factor *= down * LOW_UNIT
            b *= HIGH_UNIT / LOW_UNIT
        q_low, q_high = (a * up[:, None]).to(dtype), (b * up[:, None]).to(dtype)

    # The tokens that some row of this tile sees, cut into runs, one a split, of whole tiles.
    last_row = tl.minimum(first_row + BLOCK_M, new_tokens * G) - 1
    end = tl.maximum(length - new_tokens + last_row // G + 1, 0)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - new_tokens + first_row // G - window + 1, 0)
        begin = begin // ALIGN * ALIGN
    if SPLIT:
        run = tl.cdiv(tl.cdiv(end - begin, BLOCK_T), splits) * BLOCK_T
        begin += split * run
        end = tl.minimum(end, begin + run)

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    offset = tl.zeros((BLOCK_M,), tl.float32)  # sum of P * minimum_v
    low = tl.zeros((BLOCK_M, HALF_PAD), tl.float32)
    high = tl.zeros((BLOCK_M, HALF_PAD), tl.float32)
    for tile in range(begin, end, BLOCK_T):
        token = tile + tl.arange(0, BLOCK_T)
        token_mask = token < end
        # Lanes past the end repeat its last token: what they load is finite and weighs nothing.
        stored = tl.minimum(token, end - 1)
        if S % BLOCK_T == 0:  # a tile lies in one block: one table entry, one offset
            block = tl.load(table_ptr + batch.to(tl.int64) * table_stride + tile // S)
        else:
            block = tl.load(table_ptr + batch.to(tl.int64) * table_stride + stored // S)
        record = (block.to(tl.int64) * KV + kv_head) * RECORD
        slot = stored % S
        k_rows = rows_ptr + record // ELEMENT_BYTES + slot * ROW
        pairs = pairs_ptr + (record + 2 * S * ROW * ELEMENT_BYTES) // 2 + slot * 2

        k_low, k_high = _load_halves(k_rows, half, HALF, HALF_PAD, BITS, PTX, dtype)
        if BITS <= 8:
            k_scale = tl.load(pairs).to(tl.float32)
            k_minimum = tl.load(pairs + 1).to(tl.float32)
        if KEY_ROTARY:
            table_at = stored[:, None] * HALF + half[None, :]
            cos = tl.load(cos_ptr + table_at, mask=inside[None, :], other=0.0)
            sin = tl.load(sin_ptr + table_at, mask=inside[None, :], other=0.0)
            c, d = k_low.to(tl.float32), k_high.to(tl.float32)
            if BITS <= 8:
                c = c * (k_scale * LOW_UNIT)[:, None] + k_minimum[:, None]
                d = d * (k_scale * HIGH_UNIT)[:, None] + k_minimum[:, None]
            k_low, k_high = (c * cos - d * sin).to(dtype), (d * cos + c * sin).to(dtype)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision="ieee")
        if BITS > 8:
            scores *= score_scale
        elif KEY_ROTARY:
            scores *= factor[:, None]
        else:
            scores = scores * factor[:, None] * k_scale[None, :]
            scores += q_sum[:, None] * k_minimum[None, :]
        if SOFTCAP:
            scores = softcap_log2e * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
        seen = token_mask[None, :] & (token[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps weights exp2(-inf) = 0, not exp2(-inf + inf).
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        maximum = new_maximum
        total = total * decay + tl.sum(weights, axis=1)
        low = low * decay[:, None]
        high = high * decay[:, None]

        v_low, v_high = _load_halves(k_rows + S * ROW, half, HALF, HALF_PAD, BITS, PTX, dtype)
        if BITS <= 8:
            v_scale = tl.load(pairs + 2 * S).to(tl.float32)
            v_minimum = tl.load(pairs + 2 * S + 1).to(tl.float32)
            offset = offset * decay + tl.sum(weights * v_minimum[None, :], axis=1)
            # In units of the tile's largest scale: float16 weights would lose small V otherwise.
            unit = tl.max(v_scale, axis=0)
            weights = (weights * (v_scale / unit)[None, :]).to(dtype)
            low += tl.dot(weights, v_low, input_precision="ieee") * (unit * LOW_UNIT)
            high += tl.dot(weights, v_high, input_precision="ieee") * (unit * HIGH_UNIT)
        else:
            low = tl.dot(weights.to(dtype), v_low, low, input_precision="ieee")
            high = tl.dot(weights.to(dtype), v_high, high, input_precision="ieee")

    if not SPLIT:
        if SINKS:
            share = share_beside_sink(total, maximum, tl.load(sinks_ptr + head))
        else:
            share = 1.0 / tl.where(total > 0.0, total, 1.0)
        low = (low + offset[:, None]) * share[:, None]
        high = (high + offset[:, None]) * share[:, None]
        out_at = out_ptr + (q_row[:, None] * H + head[:, None]) * (2 * HALF) + half[None, :]
        tl.store(out_at, low.to(out_ptr.dtype.element_ty), mask=q_mask)
        tl.store(out_at + HALF, high.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        part = (q_row * H + head) * splits + split
        partial_at = partial_ptr + part[:, None] * (2 * HALF) + half[None, :]
        tl.store(partial_at, low + offset[:, None], mask=q_mask)
        tl.store(partial_at + HALF, high + offset[:, None], mask=q_mask)
        tl.store(stats_ptr + part * 2, maximum, mask=row_mask)
        tl.store(stats_ptr + part * 2 + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    partial_ptr,  # (T * H, splits, D) float32
    stats_ptr,  # (T * H, splits, 2) float32
    out_ptr,  # (T * H, D)
    sinks_ptr,  # (H,) float32, read when SINKS
    splits,
    H: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    stats = stats_ptr + (row * splits + split) * 2
    maximum = tl.load(stats, mask=split < splits, other=float("-inf"))
    total = tl.load(stats + 1, mask=split < splits, other=0.0)
    top = tl.max(maximum, axis=0)
    weight = tl.exp2(maximum - tl.where(top == float("-inf"), 0.0, top))
    channel = tl.arange(0, D_PAD)
    at = partial_ptr + (row * splits + split[:, None]) * D + channel[None, :]
    mask = (split < splits)[:, None] & (channel < D)[None, :]
    merged = tl.sum(tl.load(at, mask=mask, other=0.0) * weight[:, None], axis=0)
    norm = tl.sum(total * weight, axis=0)
    if SINKS:
        merged = merged * share_beside_sink(norm, top, tl.load(sinks_ptr + row % H))
    else:
        merged = merged / tl.where(norm > 0.0, norm, 1.0)
    tl.store(out_ptr + row * D + channel, merged.to(out_ptr.dtype.element_ty), mask=channel < D)


def attention_triton(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> None:
    """See `attention`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        q = q.float()  # the interpreter's dot multiplies the bit patterns of bfloat16
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = pages.num_kv_heads, head_dim // 2
    rows_per_head = batch.max_seqlen_q * (num_heads // num_kv_heads)
    block_m = min(max(16, triton.next_power_of_2(rows_per_head)), 64 if head_dim <= 128 else 32)
    row_blocks = triton.cdiv(rows_per_head, block_m)
    block_t, num_warps = _tile(block_m, 2 * head_dim * pages.bits // 8)
    batch_size = batch.seq_lens.shape[0]
    programs = row_blocks * num_kv_heads * batch_size
    length = seen_tokens(batch, options)
    splits = options.num_splits or num_decode_splits(programs, length, q.device)

    partial = stats = out
    if splits > 1:
        partial = q.new_empty((tokens, num_heads, splits, head_dim), dtype=torch.float32)
        stats = q.new_empty((tokens, num_heads, splits, 2), dtype=torch.float32)
    softcap, rotary, sinks = options.logit_softcap, options.rotary, options.sinks
    rows = pages.storage if pages.quantized else pages.storage.view(getattr(torch, pages.dtype))
    _attention_kernel[(row_blocks, num_kv_heads, batch_size * splits)](
        q,
        out,
        partial,
        stats,
        rows,
        pages.storage.view(torch.float16),
        batch.block_tables,
        batch.cu_seqlens_q,
        batch.seq_lens,
        q if rotary is None else rotary[0],
        q if rotary is None else rotary[1],
        q if sinks is None else sinks,
        batch.block_tables.stride(0),
        splits,
        q.stride(0),
        options.softmax_scale * (_LOG2E if softcap is None else 1.0 / softcap),
        0.0 if softcap is None else softcap * _LOG2E,
        options.sliding_window or 0,
        H=num_heads,
        KV=num_kv_heads,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        S=pages.block_size,
        ROW=head_dim * pages.bits // 8 // rows.element_size(),
        RECORD=pages.storage.shape[2],
        ELEMENT_BYTES=rows.element_size(),
        BITS=pages.bits,
        SPLIT=splits > 1,
        SOFTCAP=softcap is not None,
        WINDOW=options.sliding_window is not None,
        SINKS=sinks is not None,
        KEY_ROTARY=rotary is not None,
        PTX=q.device.type == "cuda" and torch.version.cuda is not None,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
        ALIGN=math.gcd(pages.block_size, block_t),
        num_warps=num_warps,
    )
    if splits > 1:
        _merge_kernel[(tokens * num_heads,)](
            partial,
            stats,
            out,
            out if sinks is None else sinks,
            splits,
            H=num_heads,
            SINKS=sinks is not None,
            D=head_dim,
            D_PAD=triton.next_power_of_2(head_dim),
            SPLITS_PAD=8 if splits <= 8 else 64,
            num_warps=4,
        )


def _tile(block_m: int, token_bytes: int) -> tuple[int, int]:
    """Tokens of a tile and warps of a program, for decode rows and for prefill tiles.

    Triton's pipeline holds two tiles of K and V, `token_bytes` per token, in shared memory.
    """
    block_t, num_warps = (64, 2) if block_m == 16 else (32, 4)
    fitting = triton.next_power_of_2(_TILE_BYTES // token_bytes + 1) // 2
    return max(16, min(block_t, fitting)), num_warps


_TILE_BYTES = 2**16
"""Bytes of K and V in one tile: two of them, and the queries, fit the 163 KiB of compute
capability 8.0."""


def num_decode_splits(programs: int, length: int, device: torch.device) -> int:
    """Splits that give every multiprocessor four programs, of at least 256 tokens each."""
    if device.type != "cuda":
        return 1
    wanted = 4 * multiprocessors(device.index)
    return max(1, min(wanted // max(programs, 1), triton.cdiv(length, 256), 64))
