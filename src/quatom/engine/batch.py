"""A scheduled step -> the tensors that a model runs on.

Tokens are packed without padding, decodes first. An input token that was sampled by the previous
step may not be known to the host yet: its place holds -1 - row, and the runner puts row `row` of
the tokens sampled last there, on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quatom.engine.scheduler import ScheduledSequence
from quatom.engine.sequence import Sequence
from quatom.engine.transfer import to_device_together
from quatom.modeling.context import ForwardContext


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one step."""

    input_ids: Tensor  # (T,) int64; -1 - row: row `row` of the tokens sampled by the last step
    context: ForwardContext
    sample_rows: Tensor  # (M,) int64, rows of hidden states whose next token is sampled
    items: list[ScheduledSequence]
    """In the order of the batch."""
    uses_last_tokens: bool
    """Whether input_ids holds negative entries."""

    @property
    def sampled(self) -> list[ScheduledSequence]:
        """Items that sample a token, in the order of sample_rows."""
        return [item for item in self.items if item.samples]


def build_batch(items: list[ScheduledSequence], *, block_size: int, device: torch.device) -> Batch:
    """Lay out a step: token ids, positions, slots, block tables and lengths."""
    decodes = [item for item in items if item.count == 1]
    prefills = [item for item in items if item.count > 1]
    items = decodes + prefills
    n = len(decodes)
    num_tokens = n + sum(item.count for item in prefills)

    input_ids = np.zeros(num_tokens, dtype=np.int64)
    positions = np.zeros(num_tokens, dtype=np.int64)
    slots = np.zeros(num_tokens, dtype=np.int64)
    width = max(len(item.sequence.block_table) for item in items)
    tables = np.zeros((len(items), width), dtype=np.int32)
    for row, item in enumerate(items):
        table = item.sequence.block_table
        tables[row, : len(table)] = np.frombuffer(table, dtype=np.int32)

    input_ids[:n] = [_token(item.sequence, item.start) for item in decodes]
    positions[:n] = [item.start for item in decodes]
    slots[:n] = _slots(tables[np.arange(n), positions[:n] // block_size], positions[:n], block_size)
    first = n
    for row, item in enumerate(prefills, start=n):
        last = first + item.count
        where = np.arange(item.start, item.start + item.count)
        input_ids[first:last] = item.sequence.token_ids[item.start : item.start + item.count]
        positions[first:last] = where
        slots[first:last] = _slots(tables[row, where // block_size], where, block_size)
        first = last

    counts = [item.count for item in items]
    seq_lens = [item.start + item.count for item in items]
    # Prefix sums of the prefills last: a batch of decodes has none.
    arrays: list[np.ndarray] = [input_ids, positions, slots, tables, _prefix_sums(counts)]
    arrays += [np.array(seq_lens, dtype=np.int32), _assign_sample_rows(items)]
    if len(counts) > n:
        arrays += [_prefix_sums(counts[n:]), _prefix_sums(seq_lens[n:])]
    ids, at, to, blocks, starts, lengths, rows, *prefill = to_device_together(arrays, device)
    return Batch(
        input_ids=ids,
        context=ForwardContext(
            positions=at,
            slot_mapping=to,
            block_tables=blocks,
            cu_seqlens_q=starts,
            seq_lens=lengths,
            max_seqlen_q=max(counts),
            max_seq_len=max(seq_lens),
            num_decodes=n,
            total_kv_tokens=sum(seq_lens[n:]),
            prefill_cu_seqlens=(prefill[0], prefill[1]) if prefill else None,
        ),
        sample_rows=rows,
        items=items,
        uses_last_tokens=bool((input_ids < 0).any()),
    )


def _prefix_sums(counts: list[int]) -> np.ndarray:  # (n,) -> (n + 1,) int32
    return np.cumsum([0, *counts], dtype=np.int32)


def _token(sequence: Sequence, position: int) -> int:
    """A token's id, or -1 - row where only the device knows it."""
    token_ids = sequence.token_ids
    return token_ids[position] if position < len(token_ids) else -1 - sequence.sample_row


def _slots(blocks: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    return blocks.astype(np.int64) * block_size + positions % block_size


def _assign_sample_rows(items: list[ScheduledSequence]) -> np.ndarray:  # -> (M,) int64
    """Rows of the tokens whose successors are sampled; each sequence learns its place in them."""
    rows: list[int] = []
    end = 0
    for item in items:
        end += item.count
        if item.samples:
            item.sequence.sample_row = len(rows)
            rows.append(end - 1)
    return np.array(rows, dtype=np.int64)
