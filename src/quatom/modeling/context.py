"""What a forward pass must know besides its tokens: their positions and where they are stored."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quatom.ops.shared import Shared


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """A packed batch of B sequences with T new tokens in all (prefill chunks and decodes mixed).

    The new tokens of sequence b are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]; they are the last
    ones of its seq_lens[b] tokens. All tensors live on the model's device.
    """

    positions: Tensor  # (T,) int64, position of each new token in its sequence
    slot_mapping: Tensor  # (T,) int64, block * block_size + offset; -1: not stored
    block_tables: Tensor  # (B, max_blocks) int32, KV blocks of each sequence in order
    cu_seqlens_q: Tensor  # (B + 1,) int32, prefix sums of new tokens
    seq_lens: Tensor  # (B,) int32, tokens of each sequence, the new ones included
    max_seqlen_q: int
    """Largest number of new tokens of a sequence; 1 for a pure decode batch."""
    max_seq_len: int
    """Largest of seq_lens."""
    num_decodes: int = 0
    """The first sequences of a mixed batch that have one new token each."""
    total_kv_tokens: int | None = None
    """Sum of seq_lens without the decodes, where the host knows it: saves a prefill on a GPU from
    reading it back."""
    prefill_cu_seqlens: tuple[Tensor, Tensor] | None = None
    """(B - num_decodes + 1,) int32 prefix sums of the new and of all tokens of the sequences that
    are not decodes, where the host knows them: saves every layer of a prefill on a GPU the sums."""
    shared: Shared = field(default_factory=dict, init=False, repr=False, compare=False)
    """What the layers make of the above and share."""


class AttentionCall(Protocol):
    """The attention of a layer."""

    def __call__(self, q: Tensor, context: ForwardContext, *, out: Tensor | None = None) -> Tensor:
        """What queries (T, H, D) see of their sequences, (T, H, D); written to `out` if given."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a forward pass stops for the attention of a layer."""

    attention: AttentionCall
    q: Tensor  # (T, H, D)
    residual: Tensor  # (T, hidden), what the layer's output will be added to


Stages = Generator[Stop, Tensor, Stop]
"""A forward pass that stops for each attention and is sent its result, (T, H, D).

The last stop is what it returns: nothing that follows is read by other tokens, so whoever runs it
decides for which of them it is needed.
"""


def advance(stages: Stages, attended: Tensor | None) -> tuple[Stop, bool]:
    """The next stop, and whether it is the last.

    Args:
        stages: a forward pass.
        attended: result of the attention that it stopped for; None at the start.
    """
    try:
        return (next(stages) if attended is None else stages.send(attended)), False
    except StopIteration as end:
        last: Stop = end.value
        return last, True


def full_sequences_context(
    num_sequences: int, length: int, block_size: int, device: torch.device
) -> ForwardContext:
    """Context of equally long sequences from position 0, their KV blocks laid out in order."""
    blocks = -(-length // block_size)
    tokens = torch.arange(length, device=device)
    starts = torch.arange(num_sequences, device=device).unsqueeze(1) * blocks * block_size
    return ForwardContext(
        positions=tokens.repeat(num_sequences),
        slot_mapping=(starts + tokens).flatten(),
        block_tables=torch.arange(num_sequences * blocks, dtype=torch.int32, device=device).view(
            num_sequences, blocks
        ),
        cu_seqlens_q=torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length,
        seq_lens=torch.full((num_sequences,), length, dtype=torch.int32, device=device),
        max_seqlen_q=length,
        max_seq_len=length,
        total_kv_tokens=num_sequences * length,
    )
