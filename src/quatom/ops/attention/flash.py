"""Prefill on CUDA: dequantize the cache into a workspace, then torch's FlashAttention.

For chunks of hundreds of tokens the workspace costs a few percent of the attention itself, and the
matrix kernels are those of FlashAttention-2. The workspace holds the new tokens too, so that they
are seen as decode will see them; keys stored before rotary embedding are rotated on the way.
"""

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences
from quatom.ops.attention.triton_gather import gather_triton


def prefill_flash(
    q: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> Tensor:
    """See `attention`: prefill chunks, packed, over any cache format."""
    cu_seqlens_k = batch.cu_seqlens_k
    if cu_seqlens_k is None:
        cu_seqlens_k = torch.zeros_like(batch.cu_seqlens_q)
        torch.cumsum(batch.seq_lens, 0, dtype=torch.int32, out=cu_seqlens_k[1:])
    total = options.total_kv_tokens
    if total is None:
        total = int(cu_seqlens_k[-1])
    if not total:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    k, v = gather_triton(
        pages,
        batch.block_tables,
        cu_seqlens_k,
        total,
        batch.max_seq_len,
        q.dtype,
        options.rotary,
    )
    window = options.sliding_window
    result = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        batch.cu_seqlens_q,
        cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seq_len,
        0.0,
        True,  # causal, aligned to the last token
        False,
        scale=options.softmax_scale,
        # With a window torch asks for it on both sides; 0 to the right is causal.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return result[0]
