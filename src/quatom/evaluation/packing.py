"""Sequences of different lengths in one forward pass: no padding, equal beginnings once.

Choices of a question share its tokens. Their keys and values are computed by the first of them and
read by the others through the block table, whole KV blocks at a time, in the same pass: a layer
stores all new keys and values before it attends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quatom.modeling.context import ForwardContext

KV_BLOCK_SIZE = 16
"""The smallest that the KV cache has: beginnings are shared in steps of it."""

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Packed:
    """One sequence of a batch."""

    index: int
    """Of the sequence, in the order they were given."""
    shared: int
    """Leading tokens that the sequence before it in the batch has computed; whole KV blocks."""


def pack(
    sequences: Sequence[Tokens], computed: Sequence[int], batch_tokens: int
) -> list[list[Packed]]:
    """Batches of at most `batch_tokens` tokens that must be computed, longest sequences first.

    A longer sequence is a batch of its own. So a batch that does not fit the memory fails at the
    start of a run, not at its end.

    Args:
        computed: how many last tokens of each sequence must be computed by itself: those whose
            hidden states are read.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for index, tokens in enumerate(sequences):
        families.setdefault(tuple(tokens[:KV_BLOCK_SIZE]), []).append(index)

    batches: list[list[Packed]] = []
    room = 0
    for family in sorted(families.values(), key=lambda f: -max(len(sequences[i]) for i in f)):
        # In lexicographic order neighbours share the most.
        for index in sorted(family, key=lambda i: tuple(sequences[i])):
            tokens = sequences[index]
            shared = 0
            if batches:
                before = sequences[batches[-1][-1].index]
                limit = min(len(tokens) - computed[index], len(before))
                shared = _equal(before, tokens, limit) // KV_BLOCK_SIZE * KV_BLOCK_SIZE
            if not batches or len(tokens) - shared > room:
                batches.append([])
                room, shared = batch_tokens, 0
            batches[-1].append(Packed(index, shared))
            room -= len(tokens) - shared
    return batches


def _equal(a: Tokens, b: Tokens, limit: int) -> int:
    """How many of the first `limit` tokens are equal in both."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def num_kv_blocks(capacities: Sequence[int], shared: Sequence[int] = ()) -> int:
    """KV blocks of sequences of up to `capacities` tokens, `shared` of which another one holds."""
    blocks = sum(-(-capacity // KV_BLOCK_SIZE) for capacity in capacities)
    return blocks - sum(shared) // KV_BLOCK_SIZE


def packed_context(
    starts: Sequence[int],
    lengths: Sequence[int],
    capacities: Sequence[int],
    device: torch.device,
    shared: Sequence[int] = (),
) -> ForwardContext:
    """Context of B sequences, whose KV blocks lie one after another.

    Args:
        starts: position of each sequence's first new token.
        lengths: new tokens of each, at least one.
        capacities: tokens each may grow to; the same in every call on one KV cache.
        shared: leading tokens of each that lie in the blocks of the sequence before it.
    """
    size = KV_BLOCK_SIZE
    blocks = [-(-capacity // size) for capacity in capacities]
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    positions, slots = [], []
    first = 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        borrowed = shared[row] // size if shared else 0
        tables[row, :borrowed] = tables[row - 1, :borrowed]
        own = blocks[row] - borrowed
        tables[row, borrowed : blocks[row]] = torch.arange(first, first + own)
        first += own
        tokens = torch.arange(start, start + length)
        positions.append(tokens)
        slots.append(tables[row, tokens // size].long() * size + tokens % size)
    sequences = [start + length for start, length in zip(starts, lengths, strict=True)]
    prefix = torch.tensor([0, *lengths]).cumsum(0)
    return ForwardContext(
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        cu_seqlens_q=prefix.to(torch.int32).to(device),
        seq_lens=torch.tensor(sequences, dtype=torch.int32, device=device),
        max_seqlen_q=max(lengths),
        max_seq_len=max(sequences),
        total_kv_tokens=sum(sequences),
    )
