"""Prefill on CUDA: dequantize the cache into a workspace, then torch's FlashAttention.

For chunks of hundreds of tokens the workspace costs a few percent of the attention itself, and the
matrix kernels are those of FlashAttention-2. The workspace holds the new tokens too, so that they
are seen as decode will see them.
"""

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions
from quatom.ops.attention.triton_gather import gather_triton


def prefill_flash(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    max_seq_len: int,
    options: AttentionOptions,
    total_kv_tokens: int | None,
) -> None:
    """See `attention`: prefill chunks, packed, over any cache format."""
    cu_seqlens_k = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(cu_seqlens_k[-1]) if total_kv_tokens is None else total_kv_tokens
    if not total:
        out.zero_()
        return
    k, v = gather_triton(pages, block_tables, cu_seqlens_k, total, max_seq_len, q.dtype)
    window = options.sliding_window
    result = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seq_len,
        0.0,
        True,  # causal, aligned to the last token
        False,
        scale=options.softmax_scale,
        # With a window torch asks for it on both sides; 0 to the right is causal.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    out.copy_(result[0])
