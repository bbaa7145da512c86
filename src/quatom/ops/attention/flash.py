"""Prefill on CUDA: dequantize the cache into a workspace, then a kernel over that.

For chunks of hundreds of tokens the workspace costs a few percent of the attention itself. It holds
the new tokens too, so that they are seen as decode will see them; keys stored before rotary
embedding are rotated on the way. Tokens that lie before the windows of all new ones are left out.

The kernel is a Triton kernel where it is faster or alone has what is asked (a logit soft-cap), else
torch's FlashAttention-2; there sinks take their share of the result afterwards, from the
log-sum-exp of each row's scores.
"""

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences, seen_tokens
from quatom.ops.attention.triton_gather import gather_triton
from quatom.ops.attention.triton_prefill import faster_than_flash, prefill_triton
from quatom.ops.cuda_build import device_capability

HEAD_MULTIPLE = 8
"""Channels that FlashAttention's heads are made of: others are padded with zeros."""


def prefill_cuda(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> None:
    """See `attention`: prefill chunks, packed, over any cache format."""
    window, most = options.sliding_window, seen_tokens(batch, options)
    left_out = window is not None and window < batch.max_seq_len
    cu_seqlens_k, total = _brought(q.shape[0], batch, options, left_out)
    if not total:
        out.zero_()
        return
    head_dim, capability = q.shape[2], device_capability(q.device.index)
    own = options.logit_softcap is not None or faster_than_flash(head_dim, capability)
    padding = 0 if own else -head_dim % HEAD_MULTIPLE
    k, v = gather_triton(
        pages,
        batch.block_tables,
        cu_seqlens_k,
        total,
        most,
        q.dtype,
        options.rotary,
        seq_lens=batch.seq_lens if left_out else None,
        padding=padding,
    )
    if own:
        starts = batch.cu_seqlens_q, cu_seqlens_k
        prefill_triton(q, k, v, out, *starts, batch.max_seqlen_q, options)
        return
    result, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        torch.nn.functional.pad(q, (0, padding)) if padding else q,
        k,
        v,
        batch.cu_seqlens_q,
        cu_seqlens_k,
        batch.max_seqlen_q,
        most,
        0.0,
        True,  # causal, aligned to the last token
        False,
        scale=options.softmax_scale,
        # With a window torch asks for it on both sides; 0 to the right is causal.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    if options.sinks is not None:
        if log_sums.shape != (q.shape[1], q.shape[0]):
            raise BackendError(
                f"torch {torch.__version__} gives log-sum-exps {tuple(log_sums.shape)} of packed "
                f"sequences, sinks need {(q.shape[1], q.shape[0])}: use backend triton"
            )
        # exp(lse) / (exp(lse) + exp(sink)), of lse (H, T); +inf for a row that sees nothing, whose
        # output is 0. One more rounding to q's dtype.
        result.mul_((log_sums - options.sinks[:, None]).sigmoid().t().unsqueeze(-1))
    out.copy_(result[..., :head_dim])


def _brought(
    rows: int, batch: Sequences, options: AttentionOptions, left_out: bool
) -> tuple[Tensor, int]:
    """Prefix sums of each sequence's tokens in the workspace, and an upper bound of all of them."""
    counts, sums, total = batch.seq_lens, batch.cu_seqlens_k, options.total_kv_tokens
    if left_out:
        before = (options.sliding_window or 1) - 1  # what the first new token sees besides itself
        counts, sums = torch.minimum(counts, batch.cu_seqlens_q.diff() + before), None
        total = None if total is None else min(total, rows + before * counts.shape[0])
    if sums is None:
        sums = torch.zeros_like(batch.cu_seqlens_q)
        torch.cumsum(counts, 0, dtype=torch.int32, out=sums[1:])
    return sums, int(sums[-1]) if total is None else total
