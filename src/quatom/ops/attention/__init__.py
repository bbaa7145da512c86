"""Causal attention of new tokens over the paged KV cache: decode, prefill and mixed batches."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quatom.errors import BackendError, ShapeError
from quatom.numerics.kv_pages import KVPages
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_build import device_capability
from quatom.ops.shared import Shared

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)
MAX_DECODE_TOKENS = 4
"""A sequence with at most this many new tokens is decoded straight from its codes."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which rows of q belong to which cached sequence; `attention` documents each field."""

    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    max_seqlen_q: int
    max_seq_len: int
    cu_seqlens_k: Tensor | None = None
    """Prefix sums of seq_lens, if the caller knows them."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an implementation needs besides tensors; `attention` documents each field."""

    softmax_scale: float
    sliding_window: int | None = None
    logit_softcap: float | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    num_splits: int | None = None
    total_kv_tokens: int | None = None
    shared: Shared | None = None
    sinks: Tensor | None = None
    settled: bool = False


def seen_tokens(batch: Sequences, options: AttentionOptions) -> int:
    """An upper bound of the cached tokens of a sequence that its new ones see."""
    if options.sliding_window is None:
        return batch.max_seq_len
    return min(batch.max_seq_len, options.sliding_window + batch.max_seqlen_q - 1)


def attention(
    q: Tensor,  # (T, H, D) float16, bfloat16 or float32, as `rope_append_kv` returns it
    pages: KVPages,  # KV heads divide H; the new tokens are already appended
    *,
    block_tables: Tensor,  # (B, max_blocks) int32
    cu_seqlens_q: Tensor,  # (B + 1,) int32, prefix sums of new tokens
    seq_lens: Tensor,  # (B,) int32, tokens of each sequence, the new ones included
    max_seqlen_q: int,
    max_seq_len: int,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,) float32
    rotary: tuple[Tensor, Tensor] | None = None,  # cos, sin (max_position, D / 2) float32
    num_decodes: int = 0,
    total_kv_tokens: int | None = None,
    prefill_cu_seqlens: tuple[Tensor, Tensor] | None = None,  # two (B - num_decodes + 1,) int32
    num_splits: int | None = None,
    shared: Shared | None = None,
    settled: bool = False,
    out: Tensor | None = None,  # (T, H, D) contiguous, in q's dtype
    backend: Backend | None = None,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v for every new token, over what its sequence has cached.

    The new tokens of a sequence are its last ones: new token i of n sees cached tokens 0 to
    seq_len - n + i, or the last `sliding_window` of those. K and V are what the cache dequantizes
    to, for the new tokens too, so that a prompt processed at once, in chunks or token by token
    gives the same result up to float rounding. A token that sees nothing (a padding row with
    seq_len 0) gets zeros. The same call gives bit-equal results: nothing depends on timing.

    Args:
        max_seqlen_q: largest number of new tokens of a sequence.
        max_seq_len: an upper bound of seq_lens; bounds grids and workspaces.
        softmax_scale: default D**-0.5.
        sliding_window: tokens that a token sees, itself included; None: all. Kernels read no block
            that lies before the windows of all new tokens of its sequence.
        logit_softcap: c in c * tanh(score / c), applied after softmax_scale; None is off.
        sinks: a logit of each query head that takes part in the softmax's sum and has no value, so
            that the weights of tokens sum to less than 1. It is neither scaled nor capped.
        rotary: cos and sin tables, where the cache holds K before rotary embedding: K is rotated
            by its token's position as it is read.
        num_decodes: the first sequences of the batch that have one new token each. A mixed batch
            then decodes those from codes, and only the rest pays for a prefill.
        total_kv_tokens: sum of seq_lens of the sequences that are not decodes, if the caller knows
            it; a CUDA prefill otherwise reads it back from the device.
        prefill_cu_seqlens: prefix sums of the new tokens and of seq_lens of those sequences, if the
            caller knows them; otherwise a CUDA prefill adds them up.
        num_splits: parts that a decode cuts every sequence into; None picks enough to fill the
            device.
        shared: what the layers of one batch share; only the reference uses it.
        settled: kernels on the stream that may still run when this call starts write q and the new
            tokens' keys and values, and nothing else that it reads. With `rope_append_kv(settled=
            True)` before it those are that kernel and the ones whose results it waits for. A decode
            then reads older tokens while they run.
        out: where the result is written; None: into memory of its own.
        backend: implementation to run; None picks the fastest one that supports the call.

    Returns:
        (T, H, D) in q's dtype; `out` where that is given.

    Raises:
        ShapeError: shapes or dtypes disagree.
        BackendError: the backend asked for cannot run this call.

    Source: FlashAttention-2 (Dao, 2023) for the online softmax; Flash-Decoding (Dao et al., 2023)
    for splitting a sequence; PagedAttention (Kwon et al., SOSP 2023); gpt-oss (OpenAI, 2025) for
    sinks.
    """
    _check(q, pages, block_tables, cu_seqlens_q, seq_lens, rotary, sinks)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ShapeError(
            f"out {tuple(out.shape)} {out.dtype} must be contiguous, {tuple(q.shape)} {q.dtype}"
        )
    if not q.shape[0]:
        return out
    options = AttentionOptions(
        softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(pages.head_dim),
        sliding_window,
        logit_softcap,
        rotary,
        num_splits,
        total_kv_tokens,
        shared,
        sinks,
        settled,
    )
    n = num_decodes
    cu_q, cu_k = prefill_cu_seqlens or (None, None)
    if not 0 < n < seq_lens.shape[0] or max_seqlen_q == 1:
        batch = Sequences(
            block_tables,
            cu_seqlens_q,
            seq_lens,
            max_seqlen_q,
            max_seq_len,
            None if n else cu_k,
        )
        _run(q, out, pages, batch, options, backend)
        return out
    # Decodes have one new token each, so sequence i of them is row i of q.
    decodes = Sequences(block_tables[:n], cu_seqlens_q[: n + 1], seq_lens[:n], 1, max_seq_len)
    rest = Sequences(
        block_tables[n:],
        cu_seqlens_q[n:] - n if cu_q is None else cu_q,
        seq_lens[n:],
        max_seqlen_q,
        max_seq_len,
        cu_k,
    )
    _run(q[:n], out[:n], pages, decodes, options, backend)
    if cu_q is None:
        options = replace(options, settled=False)  # the difference above was computed just now
    _run(q[n:], out[n:], pages, rest, options, backend)
    return out


def _run(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
    backend: Backend | None,
) -> None:
    """Attention of one homogeneous part of a batch."""
    decode = batch.max_seqlen_q <= MAX_DECODE_TOKENS
    obstacle = _cuda_obstacle(q, pages, decode, options)
    available = BACKENDS if obstacle is None else BACKENDS[:-1]
    if backend is Backend.CUDA and obstacle is not None:
        raise BackendError(f"attention cannot run on backend cuda: {obstacle}; use backend triton")
    match choose_backend("attention", available, q.device, backend):
        case Backend.REFERENCE:
            from quatom.ops.attention.reference import attention_reference as run
        case Backend.TRITON:
            from quatom.ops.attention.triton import attention_triton as run
        case _:
            if decode:
                from quatom.ops.attention.cuda import decode_cuda as run
            else:
                from quatom.ops.attention.flash import prefill_cuda as run
    run(q, out, pages, batch, options)


def _cuda_obstacle(
    q: Tensor,
    pages: KVPages,
    decode: bool,
    options: AttentionOptions,
) -> str | None:
    """Why the CUDA backend cannot run this call, or None if it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype is torch.float32:
        return "it computes float16 and bfloat16 queries, got float32"
    if not decode:
        return None
    if options.rotary is not None:
        return "its decode kernel does not rotate keys as it reads them: append them rotated"
    if (capability := device_capability(q.device.index)) < (8, 0):
        return f"its decode kernel needs compute capability 8.0, this device has {capability}"
    if pages.dtype != "int4":
        return f"its decode kernel reads int4 caches, got {pages.dtype}"
    if pages.head_dim % 16:
        return f"its decode kernel reads heads of 16 n channels, got {pages.head_dim}"
    return None


def _check(
    q: Tensor,
    pages: KVPages,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
) -> None:
    if q.ndim != 3 or q.shape[2] != pages.head_dim or q.shape[1] % pages.num_kv_heads:
        raise ShapeError(
            f"q {tuple(q.shape)} must be (T, H, {pages.head_dim}) with H a multiple of the cache's "
            f"{pages.num_kv_heads} KV heads"
        )
    if q.stride(-1) != 1 or q.stride(-2) != pages.head_dim:
        raise ShapeError(f"heads of q must be contiguous, got strides {q.stride()}")
    batch = seq_lens.shape[0]
    if block_tables.shape[0] != batch or cu_seqlens_q.shape != (batch + 1,):
        raise ShapeError(
            f"{batch} sequences need {batch} block tables and {batch + 1} prefix sums, got "
            f"{block_tables.shape[0]} and {cu_seqlens_q.shape[0]}"
        )
    for name, tensor in (
        ("block_tables", block_tables),
        ("cu_seqlens_q", cu_seqlens_q),
        ("seq_lens", seq_lens),
    ):
        if tensor.dtype is not torch.int32:
            raise ShapeError(f"{name} must be int32, got {tensor.dtype}")
    if block_tables.shape[1] > 1 and block_tables.stride(1) != 1:
        raise ShapeError(f"rows of block_tables must be contiguous: {block_tables.stride()}")
    if rotary is not None and rotary[0].shape[-1] * 2 != pages.head_dim:
        raise ShapeError(
            f"rotary tables {tuple(rotary[0].shape)} must be (max_position, {pages.head_dim // 2})"
        )
    if sinks is not None and (
        sinks.shape != (q.shape[1],) or sinks.dtype is not torch.float32 or sinks.stride(0) != 1
    ):
        raise ShapeError(
            f"sinks {tuple(sinks.shape)} {sinks.dtype} must be ({q.shape[1]},) float32, "
            "contiguous: one logit per query head"
        )
