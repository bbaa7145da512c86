"""What `attention` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.ops.attention import AttentionOptions, Sequences

ELEMENTS_AT_ONCE = 2**22
"""Cached values that decodes dequantize at once: 16 MiB of K and as much of V."""


def attention_reference(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> None:
    """See `attention`; float32 on any device.

    Prompts attend one sequence at a time. Sequences with one new token attend together with those
    of as many blocks: their products have the same shapes alone and in a crowd, and the same bits.
    """
    starts, lengths = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    single: dict[int, list[int]] = {}
    for b, length in enumerate(lengths):
        first, last = starts[b], starts[b + 1]
        # Query i of n stands at position length - n + i: those before position 0 see nothing.
        seeing = min(last - first, length)
        if last - seeing > first:
            out[first : last - seeing] = 0
        if seeing == 1:
            single.setdefault(-(-length // pages.block_size), []).append(b)
        elif seeing:
            k, v = pages.gather(batch.block_tables[b], length)
            if options.rotary is not None:
                k = _rotate(k.transpose(0, 1), options.rotary).transpose(0, 1)
            new = q[last - seeing : last].float()
            out[last - seeing : last] = causal_attention(new, k, v, options)
    for num_blocks, members in single.items():
        size = pages.num_kv_heads * num_blocks * pages.block_size * pages.head_dim
        together = max(1, ELEMENTS_AT_ONCE // size)
        for i in range(0, len(members), together):
            part = members[i : i + together]
            chosen = None if len(part) == len(q) else torch.tensor(part, device=q.device)
            _attend_single(q, out, pages, batch, options, chosen, num_blocks)


def _attend_single(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
    chosen: Tensor | None,  # (B,) int64, sequences with one new token and num_blocks blocks
    num_blocks: int,
) -> None:
    tables, lengths = batch.block_tables[:, :num_blocks], batch.seq_lens
    if chosen is None:  # all, and nothing else is in the batch
        new = q
    else:
        rows = batch.cu_seqlens_q[1:].index_select(0, chosen) - 1
        new = q.index_select(0, rows)
        tables, lengths = tables.index_select(0, chosen), lengths.index_select(0, chosen)
    k, v = pages.gather_blocks(tables)
    if options.rotary is not None:
        k = _rotate(k, options.rotary)
    new = new.float().unflatten(1, (pages.num_kv_heads, -1))  # (B, KV, G, D)
    scores = (new @ k.transpose(2, 3)).mul_(options.softmax_scale)
    if options.logit_softcap is not None:
        scores = options.logit_softcap * torch.tanh(scores / options.logit_softcap)
    length = lengths[:, None, None, None]
    token = torch.arange(k.shape[2], device=q.device)
    hidden = token >= length  # in the last block: slots that nothing was written to, NaN perhaps
    last_block = slice(-pages.block_size, None)
    v[:, :, last_block].masked_fill_(hidden[..., last_block].transpose(2, 3), 0.0)
    if options.sliding_window is not None:
        hidden |= token < length - options.sliding_window
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    attended = (weights @ v).flatten(1, 2)
    if chosen is None:
        out.copy_(attended)
    else:
        out.index_copy_(0, rows.long(), attended.to(out.dtype))


def _rotate(k: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of cached keys (..., length, D) at positions 0, 1, ..."""
    cos, sin = (table[: k.shape[-2]] for table in rotary)
    low, high = k.chunk(2, dim=-1)
    rotated = k * torch.cat((cos, cos), dim=-1)
    new_low, new_high = rotated.chunk(2, dim=-1)
    new_low -= high * sin
    new_high += low * sin
    return rotated


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
