"""DecodeGraphs: one captured CUDA graph for each class of decode batch sizes.

A graph replays the launches of a forward pass and the logits on fixed addresses, so a batch is
copied into static buffers and padded to its size class. Padding rows have no KV (length 0) and are
not stored (slot -1).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quatom.engine.batch import Batch
from quatom.engine.graph_pool import GraphPool, record
from quatom.engine.model import KVCacheLayer, Model
from quatom.modeling.context import ForwardContext
from quatom.ops import attention
from quatom.ops.backend import Backend, choose_backend


def size_classes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, then steps of 8 up to 64, of 16, and of 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def can_capture(device: torch.device) -> bool:
    """Whether a decode step on `device` only queues work: the reference reads sizes back."""
    backend = choose_backend("attention", attention.BACKENDS, device)
    return device.type == "cuda" and backend is not Backend.REFERENCE


class DecodeGraphs:
    """Graphs of pure decode steps. Needs a CUDA device; captures everything when made."""

    def __init__(
        self,
        model: Model,
        kv_cache: Sequence[KVCacheLayer],
        pool: GraphPool,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._max_blocks = -(-max_model_len // block_size)
        self._input_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._context = ForwardContext(
            positions=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            slot_mapping=torch.full((max_num_seqs,), -1, dtype=torch.int64, device=device),
            block_tables=torch.zeros(
                (max_num_seqs, self._max_blocks), dtype=torch.int32, device=device
            ),
            cu_seqlens_q=torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(max_num_seqs, dtype=torch.int32, device=device),
            max_seqlen_q=1,
            max_seq_len=max_model_len,
        )
        self._sizes = size_classes(max_num_seqs)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        for size in reversed(self._sizes):  # the largest first: smaller ones reuse its memory
            self._graphs[size] = self._capture(model, kv_cache, size, pool)

    def accepts(self, batch: Batch) -> bool:
        """Whether every sequence of the batch runs one token and samples."""
        size = len(batch.items)
        return (
            batch.context.max_seqlen_q == 1
            and batch.sample_rows.shape[0] == size <= self._sizes[-1]
            and all(item.sequence.params.prompt_logprobs is None for item in batch.items)
            and not any(item.sequence.params.embed for item in batch.items)
        )

    def replay(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Logits (B, vocab) of a decode batch; overwritten by the next replay."""
        used, context, static = len(batch.items), batch.context, self._context
        size = next(size for size in self._sizes if size >= used)
        self._input_ids[:used].copy_(input_ids)
        static.positions[:used].copy_(context.positions)
        static.slot_mapping[:used].copy_(context.slot_mapping)
        static.slot_mapping[used:size].fill_(-1)
        static.seq_lens[:used].copy_(context.seq_lens)
        static.seq_lens[used:size].zero_()
        static.block_tables[:used, : context.block_tables.shape[1]].copy_(context.block_tables)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:used]

    def _capture(
        self, model: Model, kv_cache: Sequence[KVCacheLayer], size: int, pool: GraphPool
    ) -> tuple[Any, Tensor]:
        full = self._context
        context = ForwardContext(
            positions=full.positions[:size],
            slot_mapping=full.slot_mapping[:size],
            block_tables=full.block_tables[:size],
            cu_seqlens_q=full.cu_seqlens_q[: size + 1],
            seq_lens=full.seq_lens[:size],
            max_seqlen_q=1,
            max_seq_len=full.max_seq_len,
        )

        def run() -> Tensor:
            hidden = model.forward(self._input_ids[:size], context, kv_cache)
            return model.head_logits(hidden)

        return record(pool, run)
