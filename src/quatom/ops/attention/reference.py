"""What `attention` means, in plain torch. The kernels are judged against this file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages
from quatom.numerics.kv_plans import GatherPlan
from quatom.ops.attention import AttentionOptions, Sequences
from quatom.ops.rope_append_kv.reference import rotary_factors, rotate_pairs
from quatom.ops.shared import geometry, remember, rotary_key

ELEMENTS_AT_ONCE = 2**22
"""Cached values that decodes dequantize at once: 16 MiB of K and as much of V."""


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """New tokens of one sequence that attend together."""

    first: int
    last: int
    """Rows of q."""
    length: int
    """Tokens of the sequence up to these, they included."""
    gather: GatherPlan
    rotation: tuple[Tensor, Tensor] | None
    """Rotary factors of the cached keys, two (n * S, D) tensors, where they need any."""


@dataclass(frozen=True, slots=True)
class SingleTokens:
    """B sequences with one new token each and equally many KV blocks."""

    rows: Tensor | None  # (B,) int64, rows of q; None: all of them in order
    gather: GatherPlan
    mask: Tensor  # (B * KV, 1, length) float32: 0 where a token is seen, -inf elsewhere
    rotation: tuple[Tensor, Tensor] | None
    """As above."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a batch attends: the same for all layers of one window and one rotary table."""

    blind: list[tuple[int, int]]
    """First and last row of tokens that see nothing."""
    prompts: list[PromptPiece]
    singles: list[SingleTokens]


def attention_reference(
    q: Tensor,
    out: Tensor,
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
) -> None:
    """See `attention`; float32 on any device.

    Prompts attend one sequence at a time. Sequences with one new token attend together with those
    of as many blocks, so that nothing is padded.
    """
    key = (
        "attention plan",
        q.shape[0],
        batch.max_seqlen_q,  # decodes and prompts of a mixed batch attend one after the other
        geometry(pages),
        options.sliding_window,
        rotary_key(options.rotary),
    )
    plan = remember(options.shared, key, lambda: _plan(q.shape[0], pages, batch, options))
    for first, last in plan.blind:
        out[first:last] = 0
    for piece in plan.prompts:
        k, v = pages.gather_planned(piece.gather)
        if piece.rotation is not None:
            k = rotate_pairs(k, piece.rotation)
        k, v = (x[0, :, : piece.length].transpose(0, 1) for x in (k, v))
        new = q[piece.first : piece.last].float()
        out[piece.first : piece.last] = causal_attention(new, k, v, options)
    for tokens in plan.singles:
        if tokens.rows is None:
            out.copy_(_attend_single(q, pages, tokens, options))
        else:
            attended = _attend_single(q.index_select(0, tokens.rows), pages, tokens, options)
            out.index_copy_(0, tokens.rows, attended.to(out.dtype))


def _plan(num_tokens: int, pages: KVPages, batch: Sequences, options: AttentionOptions) -> Plan:
    starts, lengths = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    plan = Plan([], [], [])
    single: dict[int, list[int]] = {}
    for b, length in enumerate(lengths):
        first, last = starts[b], starts[b + 1]
        # Query i of n is at position length - n + i: those before position 0 see nothing.
        seeing = min(last - first, length)
        if last - seeing > first:
            plan.blind.append((first, last - seeing))
        if seeing == 1:
            single.setdefault(-(-length // pages.block_size), []).append(b)
        elif seeing:
            tables = batch.block_tables[b : b + 1, : -(-length // pages.block_size)]
            gather = pages.plan_gather(tables, batch.seq_lens[b : b + 1])
            rotation = _rotation(gather.shape[-1], options)
            plan.prompts.append(PromptPiece(last - seeing, last, length, gather, rotation))
    for num_blocks, members in single.items():
        size = pages.num_kv_heads * num_blocks * pages.block_size * pages.head_dim
        together = max(1, ELEMENTS_AT_ONCE // size)
        for i in range(0, len(members), together):
            part = members[i : i + together]
            chosen = torch.tensor(part, device=batch.seq_lens.device)
            rows = None
            if len(part) != num_tokens:
                rows = batch.cu_seqlens_q.index_select(0, chosen + 1).long() - 1
            plan.singles.append(_plan_single(pages, batch, options, rows, chosen, num_blocks))
    return plan


def _plan_single(
    pages: KVPages,
    batch: Sequences,
    options: AttentionOptions,
    rows: Tensor | None,
    chosen: Tensor,  # (B,) int64, sequences with one new token and num_blocks blocks
    num_blocks: int,
) -> SingleTokens:
    tables = batch.block_tables[:, :num_blocks].index_select(0, chosen)
    lengths = batch.seq_lens.index_select(0, chosen)
    token = torch.arange(num_blocks * pages.block_size, device=lengths.device)
    hidden = token >= lengths[:, None]
    if options.sliding_window is not None:
        hidden |= token < lengths[:, None] - options.sliding_window
    mask = torch.zeros(hidden.shape, device=lengths.device).masked_fill_(hidden, -torch.inf)
    return SingleTokens(
        rows=rows,
        gather=pages.plan_gather(tables, lengths),
        mask=mask.repeat_interleave(pages.num_kv_heads, dim=0).unsqueeze(1),
        rotation=_rotation(len(token), options),
    )


def _rotation(tokens: int, options: AttentionOptions) -> tuple[Tensor, Tensor] | None:
    """Rotary factors of positions 0 to tokens - 1, which the tables may not all have."""
    if options.rotary is None:
        return None
    cos, sin = (table[:tokens] for table in options.rotary)
    missing = tokens - cos.shape[0]  # of the last block's slots, which nothing was written to
    return rotary_factors(*(torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (cos, sin)))


def _attend_single(
    q: Tensor,  # (B, H, D)
    pages: KVPages,
    tokens: SingleTokens,
    options: AttentionOptions,
) -> Tensor:  # (B, H, D) float32
    k, v = pages.gather_planned(tokens.gather)  # (B, KV, length, D) each
    if tokens.rotation is not None:
        k = rotate_pairs(k, tokens.rotation)
    groups = q.float().reshape(len(tokens.mask), -1, pages.head_dim)  # (B * KV, G, D)
    keys = k.flatten(0, 1).transpose(1, 2)
    scale, softcap = options.softmax_scale, options.logit_softcap
    if softcap is None:
        scores = torch.baddbmm(tokens.mask, groups, keys, alpha=scale)
    else:
        scores = torch.bmm(groups, keys).mul_(scale / softcap).tanh_().mul_(softcap)
        scores += tokens.mask
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.view(pages.num_kv_heads, -1).repeat(q.shape[0], 1)  # (B * KV, G)
    return torch.bmm(softmax_beside(scores, sinks), v.flatten(0, 1)).view(q.shape)


def softmax_beside(
    scores: Tensor,  # (N, M, length)
    sinks: Tensor | None,  # broadcast to (N, M): logits that have no value
) -> Tensor:
    """Weights of the tokens, (N, M, length); with sinks they sum to less than 1."""
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores.dtype).expand(scores.shape[:-1]).unsqueeze(-1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


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
    window, softcap, sinks = options.sliding_window, options.logit_softcap, options.sinks
    if n == length and window is None and softcap is None and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=options.softmax_scale
        )
        return out[0].transpose(0, 1)

    position = torch.arange(length - n, length, device=q.device)[:, None]
    token = torch.arange(length, device=q.device)
    seen = token <= position
    if window is not None:
        seen &= token > position - window
    if softcap is None and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=options.softmax_scale
        )
        return out[0].transpose(0, 1)
    scores = q @ k.transpose(1, 2)
    if softcap is None:
        scores = scores * options.softmax_scale
    else:
        scores = softcap * torch.tanh(scores * (options.softmax_scale / softcap))
    weights = softmax_beside(
        scores.masked_fill(~seen, -torch.inf), None if sinks is None else sinks[:, None]
    )
    return (weights @ v).transpose(0, 1)
