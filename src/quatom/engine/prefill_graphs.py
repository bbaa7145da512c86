"""PrefillGraphs: a step with prompts as CUDA graphs of what lies between its attentions.

A layer is a dozen launches and more, each some microseconds of the host's time: with experts the
host took longer to launch a step of 2048 tokens than the GPU to compute it. What lies between two
attentions depends on the number of tokens alone, so it is captured once for each size class, and a
step is a replay, an attention, a replay and so on. A batch is padded to its size class: padding
rows are not stored (slot -1), and no attention reads or writes them.

What follows the last attention runs for the tokens whose successors are sampled, and for no others:
nothing reads what it gives for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quatom.engine.batch import Batch
from quatom.engine.graph_pool import GraphPool, borrow
from quatom.engine.model import KVCacheLayer, Model
from quatom.engine.output_graphs import OutputGraphs
from quatom.modeling.context import AttentionCall, ForwardContext, Stages, advance

SMALLEST = 64
"""Tokens of the smallest size class."""
FREE_TOKENS = 512
"""Tokens up to which a step takes about the time of reading the weights: padding costs little."""
PADDING_SHARE = 8
"""Above FREE_TOKENS a batch is padded by at most one part in so many of its size class."""


def prefill_sizes(most: int) -> list[int]:
    """Tokens of the captured steps: 64, 96, 128, 192 and so on below `most`, and `most`."""
    return [size for size in step_classes(most) if size >= min(SMALLEST, most)]


def step_classes(most: int) -> list[int]:
    """Powers of two, once and a half, below `most`, and `most`."""
    powers = [2**i for i in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p * 3 // 2) if n < most} | {most})


@dataclass(frozen=True, slots=True)
class _Piece:
    """What runs before one attention, and that attention."""

    graph: Any  # torch.cuda.CUDAGraph
    attention: AttentionCall
    q: Tensor  # (size, H, D), overwritten by the next piece
    attended: Tensor  # (size, H, D), which the next piece reads


@dataclass(frozen=True, slots=True)
class _Step:
    pieces: list[_Piece]
    residual: Tensor  # (size, hidden), of the last piece


class PrefillGraphs:
    """Graphs of steps that are no pure decode. Needs a CUDA device; captures all when made."""

    def __init__(
        self,
        model: Model,
        kv_cache: Sequence[KVCacheLayer],
        pool: GraphPool,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        def static(value: int) -> Tensor:
            return torch.full((max_num_tokens,), value, dtype=torch.int64, device=device)

        self._input_ids, self._positions, self._slots = static(0), static(0), static(-1)
        self._attended: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._sizes = prefill_sizes(max_num_tokens)
        self._steps: dict[int, _Step] = {}
        for size in reversed(self._sizes):  # the largest first: smaller ones reuse its memory
            self._steps[size] = self._capture(model, kv_cache, size, pool)
        largest = self._steps[self._sizes[-1]]
        attended, residual = largest.pieces[-1].attended, largest.residual
        self._outputs = OutputGraphs(model, pool, attended, residual, max_num_seqs)
        self._finish = model.finish

    def accepts(self, batch: Batch) -> bool:
        """Whether the batch has a size class that it fills well enough."""
        return self.size_of(batch.input_ids.shape[0]) is not None

    def replay(self, input_ids: Tensor, batch: Batch, rows: Tensor | None) -> Tensor:
        """Hidden states of a batch; overwritten by the next replay.

        Args:
            input_ids: (T,) int64.
            batch: where they are; it says how the graphs are fed.
            rows: (M,) int64, tokens whose hidden states are needed, at most one for each sequence;
                None: all of them.

        Returns:
            (M, hidden), or (T, hidden) of all tokens.
        """
        context, used = batch.context, input_ids.shape[0]
        size = self.size_of(used)
        assert size is not None
        self._input_ids[:used].copy_(input_ids)
        self._positions[:used].copy_(context.positions)
        self._slots[:used].copy_(context.slot_mapping)
        if used < size:
            self._slots[used:size].fill_(-1)
        step = self._steps[size]
        for piece in step.pieces:
            piece.graph.replay()
            piece.attention(piece.q[:used], context, out=piece.attended[:used])
        attended = step.pieces[-1].attended
        if rows is None:
            return self._finish(attended[:used], step.residual[:used])
        return self._outputs.replay(attended, step.residual, rows)

    def size_of(self, tokens: int) -> int | None:
        """The size class of a step, or None: it would have to be padded by too much."""
        size = next((size for size in self._sizes if size >= tokens), None)
        if size is None or tokens <= FREE_TOKENS:
            return size
        return size if (size - tokens) * PADDING_SHARE <= size else None

    def _buffer(self, q: Tensor) -> Tensor:
        """Where graphs read what attention gave for these queries, (most tokens, H, D)."""
        key = (q.shape[1], q.shape[2], q.dtype)
        if key not in self._attended:
            self._attended[key] = q.new_zeros((self._sizes[-1], *q.shape[1:]))
        return self._attended[key]

    def _capture(
        self, model: Model, kv_cache: Sequence[KVCacheLayer], size: int, pool: GraphPool
    ) -> _Step:
        unused = self._slots[:1].int()
        context = ForwardContext(
            positions=self._positions[:size],
            slot_mapping=self._slots[:size],
            block_tables=unused,
            cu_seqlens_q=unused,
            seq_lens=unused,
            max_seqlen_q=size,
            max_seq_len=size,
        )

        def stages() -> Stages:
            return model.stages(self._input_ids[:size], context, kv_cache)

        with pool.stream():  # compile and autotune outside of the captures
            run, attended, last = stages(), None, False
            while not last:
                stop, last = advance(run, attended)
                attended = self._buffer(stop.q)[:size]
        pieces: list[_Piece] = []
        run, attended, last = stages(), None, False
        while not last:
            with pool.capture() as graph:
                stop, last = advance(run, attended)
            attended = self._buffer(stop.q)[:size]
            pieces.append(_Piece(graph, stop.attention, borrow(stop.q), attended))
        return _Step(pieces, borrow(stop.residual))
