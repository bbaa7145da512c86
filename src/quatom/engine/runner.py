"""ModelRunner: run one scheduled step on the device and sample, without waiting for the result.

`launch` queues copies, forward pass and sampling and returns a LaunchedStep; `LaunchedStep.wait`
gives the tokens to the host. Between the two the next step can be scheduled and launched: its
unknown input tokens are taken on the device from the tokens sampled last.
"""

from collections.abc import Sequence as Layers
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quatom.engine.batch import Batch, build_batch
from quatom.engine.config import EngineConfig
from quatom.engine.model import KVCacheLayer, Model
from quatom.engine.outputs import TokenLogprobs
from quatom.engine.sampler import INVALID_TOKEN, Sampled, build_inputs, gather_logprobs, sample
from quatom.engine.scheduler import ScheduledSequence, ScheduledStep
from quatom.engine.sequence import Sequence
from quatom.engine.step_graphs import StepGraphs
from quatom.engine.structured.masks import build_mask
from quatom.engine.transfer import to_device

LOGPROB_ROWS = 256
"""Prompt positions whose logits are held at once; 128 MiB at a vocabulary of 131072."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way: which sequences sample, and where their tokens will be."""

    items: list[ScheduledSequence]
    sampled: list[Sequence]
    tokens: Tensor  # (M,) int64 on the host, INVALID_TOKEN where logits were no numbers
    logprobs: Tensor | None  # (M,) float32 on the host
    top_logprobs: tuple[Tensor, Tensor] | None  # (M, k) on the host
    hidden: Tensor | None  # (M, hidden) float32 on the host, if a sequence asks for it
    done: torch.cuda.Event | None

    def wait(self) -> list[int]:
        """The sampled tokens, once they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.tolist()

    def token_logprobs(self, row: int, token_id: int) -> TokenLogprobs | None:
        """What row `row` of a finished step reports, if its request asked."""
        wanted = self.sampled[row].params.logprobs
        if wanted is None or self.logprobs is None:
            return None
        top: list[tuple[int, float]] = []
        if wanted and self.top_logprobs is not None:
            values, ids = (column[row, :wanted].tolist() for column in self.top_logprobs)
            top = list(zip(ids, values, strict=True))
        return TokenLogprobs(token_id, self.logprobs[row].item(), tuple(top))

    def last_hidden(self, row: int) -> tuple[float, ...]:
        """The hidden state of row `row` of a finished step, if its request asked."""
        if self.hidden is None or not self.sampled[row].params.embed:
            return ()
        return tuple(self.hidden[row].tolist())


class ModelRunner:
    """A model, its KV cache and the tokens that it sampled last."""

    def __init__(
        self,
        model: Model,
        kv_cache: Layers[KVCacheLayer],
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.config = config
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.device = device
        self.decode_graphs = None if graphs is None else graphs.decode
        self.prefill_graphs = None if graphs is None else graphs.prefill
        self._last_tokens = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, step: ScheduledStep) -> LaunchedStep:
        """Queue a step's work on the device."""
        if step.copies:
            source, target = to_device(np.array(step.copies, dtype=np.int64).T.copy(), self.device)
            for layer in self.kv_cache:
                layer.copy_blocks(source, target)
        batch = build_batch(step.items, block_size=self.config.block_size, device=self.device)
        input_ids = batch.input_ids
        if batch.uses_last_tokens:
            sampled = (-1 - input_ids).clamp(min=0)
            input_ids = torch.where(input_ids < 0, self._last_tokens[sampled], input_ids)
        rows: Tensor | None
        if self.decode_graphs is not None and self.decode_graphs.accepts(batch):
            rows, logits = None, self.decode_graphs.replay(input_ids, batch)
        else:
            rows = self._wanted_rows(input_ids, batch)
            logits = self.model.head_logits(rows)
        return self._sample(logits, rows, batch)

    def _wanted_rows(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Hidden states (M, hidden) of the tokens whose successors are sampled."""
        scored = any(item.sequence.params.prompt_logprobs is not None for item in batch.items)
        wanted = None if scored else batch.sample_rows
        if self.prefill_graphs is not None and self.prefill_graphs.accepts(batch):
            hidden = self.prefill_graphs.replay(input_ids, batch, wanted)
        else:
            hidden = self.model.forward(input_ids, batch.context, self.kv_cache, wanted)
        if not scored:
            return hidden
        self._record_prompt_logprobs(hidden, batch)
        return hidden[batch.sample_rows]

    def _sample(self, logits: Tensor, rows: Tensor | None, batch: Batch) -> LaunchedStep:
        sequences = [item.sequence for item in batch.sampled]
        if not sequences:
            nothing = torch.empty(0, dtype=torch.int64)
            return LaunchedStep(batch.items, sequences, nothing, None, None, None, None)
        inputs = build_inputs(sequences, self.vocab_size, self.eos_token_ids, self.device)
        mask = build_mask([s.matcher for s in sequences])
        sampled = sample(logits, inputs, mask)
        self._last_tokens = sampled.token_ids
        hidden = None
        if rows is not None and any(sequence.params.embed for sequence in sequences):
            hidden = rows.float()
        return self._to_host(batch, sequences, sampled, hidden)

    def _to_host(
        self, batch: Batch, sequences: list[Sequence], sampled: Sampled, hidden: Tensor | None
    ) -> LaunchedStep:
        tokens = torch.where(sampled.valid, sampled.token_ids, INVALID_TOKEN)
        logprobs, top = sampled.logprobs, sampled.top_logprobs
        done = None
        if self.device.type == "cuda":
            tokens = tokens.to("cpu", non_blocking=True)
            if logprobs is not None:
                logprobs = logprobs.to("cpu", non_blocking=True)
            if top is not None:
                top = (top[0].to("cpu", non_blocking=True), top[1].to("cpu", non_blocking=True))
            if hidden is not None:
                hidden = hidden.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return LaunchedStep(batch.items, sequences, tokens, logprobs, top, hidden, done)

    def _record_prompt_logprobs(self, hidden: Tensor, batch: Batch) -> None:
        """Append to prompt_logprobs of sequences that asked for them. This waits for the device."""
        first = 0
        for item in batch.items:
            sequence, wanted = item.sequence, item.sequence.params.prompt_logprobs
            if wanted is not None:
                # Hidden row i predicts token i + 1; a recomputed prompt repeats known positions.
                start = max(item.start, len(sequence.prompt_logprobs))
                stop = min(item.start + item.count, sequence.num_prompt - 1)
                for chunk in range(start, stop, LOGPROB_ROWS):
                    end = min(chunk + LOGPROB_ROWS, stop)
                    rows = torch.arange(chunk, end, device=self.device) + (first - item.start)
                    targets = sequence.token_ids[chunk + 1 : end + 1]
                    self._extend_prompt_logprobs(sequence, hidden, rows, targets, wanted)
            first += item.count

    def _extend_prompt_logprobs(
        self, sequence: Sequence, hidden: Tensor, rows: Tensor, targets: list[int], wanted: int
    ) -> None:
        token_ids = torch.tensor(targets, device=self.device)
        logits = self.model.compute_logits(hidden[rows])
        chosen, top = gather_logprobs(logits, token_ids, wanted)
        tops = (
            [()] * len(targets)
            if top is None
            else [
                tuple(zip(ids, values, strict=True))
                for values, ids in zip(top[0].tolist(), top[1].tolist(), strict=True)
            ]
        )
        sequence.prompt_logprobs += [
            TokenLogprobs(token_id, logprob, tuple(alternatives))
            for token_id, logprob, alternatives in zip(targets, chosen.tolist(), tops, strict=True)
        ]
