"""What `attention` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences


def attention_reference(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> None:
    """See `attention`; float32 on any device, one sequence at a time."""
    starts, lengths = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    for b, length in enumerate(lengths):
        first, last = starts[b], starts[b + 1]
        # Query i of n stands at position length - n + i: those before position 0 see nothing.
        seeing = min(last - first, length)
        out[first : last - seeing] = 0
        if seeing:
            k, v = pages.gather(batch.block_tables[b], length)
            if options.rotary is not None:
                k = _rotate(k, options.rotary)
            new = q[last - seeing : last].float()
            out[last - seeing : last] = causal_attention(new, k, v, options)


def _rotate(k: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of cached keys (length, KV, D), which stand at positions 0, 1, ..."""
    cos, sin = (table[: k.shape[0]].unsqueeze(1) for table in rotary)
    low, high = k.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def causal_attention(
    q: Tensor,  # (n, H, D) float, the last n tokens
    k: Tensor,  # (length, KV, D) same dtype
    v: Tensor,  # (length, KV, D) same dtype
    options: AttentionOptions,
) -> Tensor:
    """Attention of the last n of `length` tokens, (n, H, D)."""
    n, num_heads, _ = q.shape
    length, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # heads first
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    window, softcap = options.sliding_window, options.logit_softcap
    if n == length and window is None and softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=options.softmax_scale
        )
        return out[0].transpose(0, 1)

    position = torch.arange(length - n, length, device=q.device)[:, None]
    token = torch.arange(length, device=q.device)
    seen = token <= position
    if window is not None:
        seen &= token > position - window
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=options.softmax_scale
        )
        return out[0].transpose(0, 1)
    scores = softcap * torch.tanh(q @ k.transpose(1, 2) * (options.softmax_scale / softcap))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1)
