"""A scheduled step -> the tensors that a model runs on.

Tokens are packed without padding, decodes first. Two things are special:

- An input token that was sampled by the previous step may not be known to the host yet. Its place
  holds -1 - row, and the runner puts row `row` of the tokens sampled last there, on the device.
- A CPU's matrix product sums a row in another order when there are fewer than MIN_CPU_ROWS rows
  (measured for float32 MKL, 1 to 600 rows: 1, 2 and 3 differ, all others agree bit for bit). A
  padding sequence without KV fills smaller steps, and a request's tokens no longer depend on who
  else is running.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quatom.engine.scheduler import ScheduledSequence
from quatom.modeling.context import ForwardContext

MIN_CPU_ROWS = 4


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


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting; on a CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def build_batch(
    items: list[ScheduledSequence],
    *,
    block_size: int,
    device: torch.device,
    min_rows: int = 1,
) -> Batch:
    """Lay out a step: token ids, positions, slots, block tables and lengths."""
    decodes = [item for item in items if item.count == 1]
    prefills = [item for item in items if item.count > 1]
    items = decodes + prefills
    num_tokens = len(decodes) + sum(item.count for item in prefills)
    padding = max(0, min_rows - num_tokens)

    input_ids = np.zeros(num_tokens + padding, dtype=np.int64)
    positions = np.zeros(num_tokens + padding, dtype=np.int64)
    slots = np.full(num_tokens + padding, -1, dtype=np.int64)
    counts = [item.count for item in items] + [padding] * (padding > 0)
    seq_lens = [item.start + item.count for item in items] + [0] * (padding > 0)
    width = max(len(item.sequence.block_table) for item in items)
    tables = np.zeros((len(counts), width), dtype=np.int32)

    for row, item in enumerate(items):
        table = item.sequence.block_table
        tables[row, : len(table)] = np.frombuffer(table, dtype=np.int32)

    n = len(decodes)
    if n:
        positions[:n] = [item.start for item in decodes]
        input_ids[:n] = [
            sequence.token_ids[item.start]
            if item.start < len((sequence := item.sequence).token_ids)
            else -1 - sequence.sample_row
            for item in decodes
        ]
        blocks = tables[np.arange(n), positions[:n] // block_size].astype(np.int64)
        slots[:n] = blocks * block_size + positions[:n] % block_size
    first = n
    for row, item in enumerate(prefills, start=n):
        rows = slice(first, first + item.count)
        where = np.arange(item.start, item.start + item.count)
        known = item.sequence.token_ids[item.start : item.start + item.count]
        input_ids[first : first + len(known)] = known
        if len(known) < item.count:
            input_ids[first + len(known)] = -1 - item.sequence.sample_row
        positions[rows] = where
        slots[rows] = tables[row, where // block_size].astype(np.int64) * block_size + (
            where % block_size
        )
        first += item.count

    cu_seqlens = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    samples = np.array([item.samples for item in items], dtype=bool)
    sample_rows = cu_seqlens[1 : len(items) + 1][samples].astype(np.int64) - 1
    sample_row = 0
    for item in items:
        if item.samples:
            item.sequence.sample_row = sample_row
            sample_row += 1

    return Batch(
        input_ids=to_device(input_ids, device),
        context=ForwardContext(
            positions=to_device(positions, device),
            slot_mapping=to_device(slots, device),
            block_tables=to_device(tables, device),
            cu_seqlens_q=to_device(cu_seqlens, device),
            seq_lens=to_device(np.array(seq_lens, dtype=np.int32), device),
            max_seqlen_q=max(counts),
            max_seq_len=max(seq_lens),
            num_decodes=n,
        ),
        sample_rows=to_device(sample_rows, device),
        items=items,
        uses_last_tokens=bool((input_ids < 0).any()),
    )
