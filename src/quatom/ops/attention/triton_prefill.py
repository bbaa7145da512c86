# mypy: ignore-errors
"""Triton kernel for prefills: faster than FlashAttention-2 on Hopper, and with a logit soft-cap.

It reads the packed workspace of `flash.py`. One program takes BLOCK_M new tokens of one head and
walks the tokens they see; only tiles that touch the diagonal or the window's edge are masked.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.ops.attention import AttentionOptions
from quatom.ops.attention.triton import share_beside_sink

_LOG2E = 1.4426950408889634


@triton.jit
def _walk(
    accumulator,  # (BLOCK_M, D_PAD) float32
    maximum,  # (BLOCK_M,) of the scores, in log2
    total,  # (BLOCK_M,) of the weights
    q,  # (BLOCK_M, D_PAD)
    k_at,  # (D_PAD, BLOCK_N) of token 0
    v_at,  # (BLOCK_N, D_PAD) of token 0
    position,  # (BLOCK_M,)
    begin,
    end,
    length,
    token_stride,  # int64
    score_scale,
    softcap_log2e,
    window,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    channel = tl.arange(0, D_PAD)
    for tile in range(begin, end, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        at = tile * token_stride
        if MASKED:
            stored = token < length
            k = tl.load(k_at + at, mask=(channel < D)[:, None] & stored[None, :], other=0.0)
        elif D == D_PAD:
            k = tl.load(k_at + at)
        else:
            k = tl.load(k_at + at, mask=(channel < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        factor = score_scale  # of scores, to log2
        if SOFTCAP:
            # tanh(x) = 2 / (1 + exp(-2 x)) - 1
            factor = softcap_log2e
            scores = 2.0 / (1.0 + tl.exp2(-2.0 * score_scale * scores)) - 1.0
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (token[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
        shift = new_maximum
        if MASKED:  # a row that has seen nothing yet keeps weights exp2(-inf) = 0
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * factor - shift[:, None])  # one fused operation
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, axis=1)
        maximum = new_maximum
        if MASKED:
            v = tl.load(v_at + at, mask=stored[:, None] & (channel < D)[None, :], other=0.0)
        elif D == D_PAD:
            v = tl.load(v_at + at)
        else:
            v = tl.load(v_at + at, mask=(channel < D)[None, :], other=0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee")
    return accumulator, maximum, total


# Where a mixed batch's prefills begin changes from step to step.
@triton.jit(do_not_specialize_on_alignment=["starts_q_ptr", "starts_k_ptr"])
def _prefill_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (total, KV, D)
    v_ptr,  # (total, KV, D)
    out_ptr,  # (T, H, D)
    starts_q_ptr,  # (B + 1,) int32
    starts_k_ptr,  # (B + 1,) int32
    sinks_ptr,  # (H,) float32, read when SINKS
    q_stride,
    score_scale,  # softmax_scale * log2(e); with a soft-cap divided by that
    softcap_log2e,
    window,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2)
    first_q, first_k = tl.load(starts_q_ptr + batch), tl.load(starts_k_ptr + batch)
    new_tokens = tl.load(starts_q_ptr + batch + 1) - first_q
    length = tl.load(starts_k_ptr + batch + 1) - first_k
    # The last tokens see most: their programs start first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row >= new_tokens:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D_PAD)
    before = length - new_tokens  # position of new token 0
    position = before + row
    first, last = before + first_row, before + tl.minimum(first_row + BLOCK_M, new_tokens) - 1
    q_mask = (row < new_tokens)[:, None] & (channel < D)[None, :]
    q_row = (first_q + row).to(tl.int64)[:, None]
    q = tl.load(q_ptr + q_row * q_stride + head * D + channel[None, :], mask=q_mask, other=0.0)

    token_stride = tl.full((), KV * D, tl.int64)  # tokens times it overflow int32
    origin = first_k * token_stride + head // (H // KV) * D
    token = tl.arange(0, BLOCK_N)
    k_at = k_ptr + origin + token[None, :] * token_stride + channel[:, None]
    v_at = v_ptr + origin + token[:, None] * token_stride + channel[None, :]

    # Tiles begin to open hold a token that some row does not see any more, those from closed on one
    # that some row does not see yet.
    end = tl.maximum(last + 1, 0)
    begin, opened = 0, 0
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        opened = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
    closed = tl.maximum(tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N, opened)
    accumulator = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for phase in tl.static_range(0 if WINDOW else 1, 3):
        if phase == 0:
            start, stop = begin, tl.minimum(opened, end)
        elif phase == 1:
            start, stop = opened, closed
        else:
            start, stop = closed, end
        accumulator, maximum, total = _walk(
            accumulator,
            maximum,
            total,
            q,
            k_at,
            v_at,
            position,
            start,
            stop,
            length,
            token_stride,
            score_scale,
            softcap_log2e,
            window,
            phase != 1,
            SOFTCAP,
            WINDOW,
            D,
            D_PAD,
            BLOCK_N,
        )
    if SINKS:
        share = share_beside_sink(total, maximum, tl.load(sinks_ptr + head))
        out = accumulator * share[:, None]
    else:
        out = accumulator / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out_ptr + (q_row * H + head) * D + channel[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program of the kernel is cut."""

    rows: int
    """New tokens of a program."""
    tokens: int
    """Cached tokens of a step."""
    warps: int
    stages: int
    """Steps whose K and V are on their way."""


def prefill_triton(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (total, KV, D) contiguous, same dtype as q
    v: Tensor,  # (total, KV, D) contiguous, same dtype as q
    out: Tensor,  # (T, H, D) contiguous: written
    cu_seqlens_q: Tensor,  # (B + 1,) int32
    cu_seqlens_k: Tensor,  # (B + 1,) int32
    max_seqlen_q: int,
    options: AttentionOptions,
    tile: Tile | None = None,
) -> None:
    """Causal attention of packed sequences, aligned to their last tokens.

    `tile` overrides the choice, for measurements.
    """
    _, num_heads, head_dim = q.shape
    d_pad = triton.next_power_of_2(head_dim)
    tile = tile or choose_tile(d_pad, q.device)
    softcap = options.logit_softcap
    grid = (triton.cdiv(max_seqlen_q, tile.rows), num_heads, cu_seqlens_q.shape[0] - 1)
    _prefill_kernel[grid](
        q,
        k,
        v,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        q if options.sinks is None else options.sinks,
        q.stride(0),
        options.softmax_scale * (_LOG2E if softcap is None else 1.0 / softcap * _LOG2E),
        0.0 if softcap is None else softcap * _LOG2E,
        options.sliding_window or 0,
        H=num_heads,
        KV=k.shape[1],
        D=head_dim,
        D_PAD=d_pad,
        SOFTCAP=softcap is not None,
        WINDOW=options.sliding_window is not None,
        SINKS=options.sinks is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def faster_than_flash(head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether this kernel was measured to be faster than FlashAttention-2: docs/lab has by what."""
    return capability[0] == 9 and head_dim in (64, 128)


@cache
def _shared_memory(device: int) -> int:
    """Bytes that a CTA may take."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def choose_tile(d_pad: int, device: torch.device) -> Tile:
    """The fastest that was measured, see docs/lab/kernels-attention.md."""
    if device.type != "cuda":
        return Tile(32, 32, 4, 1)
    if _shared_memory(device.index) < 200 * 1024:
        return Tile(64, 32, 4, 2)
    return Tile(64, 64, 4, 3) if d_pad <= 128 else Tile(128, 64, 8, 2)
