"""Sequences of different lengths in one forward pass, without padding."""

from collections.abc import Sequence

import torch

from quatom.modeling.context import ForwardContext

KV_BLOCK_SIZE = 64


def pack_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences in batches of at most `batch_tokens` tokens, longest first.

    A sequence longer than that is a batch of its own. Sequences of a batch are of similar length,
    and a batch that does not fit the memory fails at the start of a run instead of at its end.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[index] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def num_kv_blocks(capacities: Sequence[int], block_size: int = KV_BLOCK_SIZE) -> int:
    """KV blocks that sequences of up to `capacities` tokens need."""
    return sum(-(-capacity // block_size) for capacity in capacities)


def packed_context(
    starts: Sequence[int],
    lengths: Sequence[int],
    capacities: Sequence[int],
    device: torch.device,
    block_size: int = KV_BLOCK_SIZE,
) -> ForwardContext:
    """Context of B sequences, whose KV blocks lie one after another.

    Args:
        starts: position of each sequence's first new token.
        lengths: new tokens of each.
        capacities: tokens each may grow to; the same in every call on one KV cache.
    """
    blocks = [-(-capacity // block_size) for capacity in capacities]
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    positions, slots = [], []
    first = 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tables[row, : blocks[row]] = torch.arange(first, first + blocks[row])
        tokens = torch.arange(start, start + length)
        positions.append(tokens)
        slots.append(tokens + first * block_size)
        first += blocks[row]
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
    )
