"""Steady decoding at fixed batch sizes: what a step costs when nobody arrives or leaves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from quatom.engine.engine import Engine
from quatom.engine.scheduler import WATERMARK
from quatom.engine.startup import greedy
from quatom.errors import EngineError

SETTLE = 4
"""Steps after a change of the batch that are not measured."""
SLACK = 16
"""Tokens of each sequence for prompts that take more steps than `prompt_lengths` expects."""


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """One batch size."""

    batch: int
    context: float
    """Cached tokens of a sequence, averaged over sequences and measured steps."""
    step_seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / fmean(self.step_seconds)


def longest_sequence(context: int, steps: int, sizes: int) -> int:
    """Tokens that a sequence may reach while `sizes` batch sizes are measured."""
    return context + sizes * (SETTLE + steps) + SLACK


def largest_batch(engine: Engine, context: int, steps: int) -> int:
    """Sequences of about `context` tokens that decode together without running out of blocks."""
    block_size = engine.config.block_size
    each = -(-longest_sequence(context, steps, 1) // block_size)
    usable = int((1.0 - WATERMARK) * engine.pool.num_blocks)
    return min(usable // each, engine.config.max_num_seqs)


def measure_batches(
    engine: Engine, batches: Sequence[int], context: int, steps: int, seed: int = 0
) -> list[BatchTiming]:
    """Time `steps` decode steps at each batch size, the largest first.

    The largest batch is filled by running its prompts; smaller ones are what is left of it after
    aborts, so that no prompt runs twice. Prompts that are run earlier are shorter by the tokens
    that they will have generated when the last one is there.

    Args:
        engine: idle, without forecast_admission, with max_model_len for `longest_sequence`.
        batches: sizes, none above `largest_batch`.
        context: cached tokens of a sequence while its batch is measured, nearly: each smaller
            batch has SETTLE + steps more. The result says the number reached.
        steps: decode steps that are timed.
        seed: of the prompts' token ids.

    Raises:
        EngineError: a batch did not stay together.
    """
    sizes = sorted(set(batches), reverse=True)
    names = fill_batch(engine, sizes[0], context - SETTLE - steps // 2, seed)
    timings = []
    for size in sizes:
        for name in names[size:]:
            engine.abort(name)
        del names[size:]
        for _ in range(SETTLE):
            engine.step()
        reached = fmean(s.num_tokens for s in engine.scheduler.running)
        timings.append(BatchTiming(size, reached + steps / 2, _time_steps(engine, size, steps)))
    end_batch(engine, names)
    return timings


def fill_batch(engine: Engine, size: int, context: int, seed: int) -> list[str]:
    """Start `size` sequences that have about `context` tokens once all of them decode."""
    generator = np.random.default_rng(seed)
    names = [f"batch-{i}" for i in range(size)]
    lengths = prompt_lengths(size, context, engine.config.max_num_batched_tokens)
    for name, length in zip(names, lengths, strict=True):
        prompt = generator.integers(engine.model_config.vocab_size, size=length).tolist()
        engine.add_request(name, prompt, greedy(engine.max_model_len - length))
    started: set[str] = set()
    idle = 0  # steps since a sequence has started
    while len(started) < size:
        before = len(started)
        deltas = engine.step()
        started |= {delta.request_id for delta in deltas}
        idle = 0 if len(started) > before else idle + 1
        if idle > context or any(delta.finish_reason for delta in deltas):
            raise _too_small(engine, size, f"{len(started)} sequences started")
    return names


def prompt_lengths(size: int, context: int, step_tokens: int) -> list[int]:
    """Prompts after which `size` sequences have `context` tokens each once the last one decodes.

    While a prompt runs, those before it generate a token a step, and their decodes take that much
    from the `step_tokens` tokens of a step.
    """
    lengths, steps = [], 0.0  # steps from the end of a sequence's prompt to the end of the last one
    for before in reversed(range(size)):
        lengths.append(max(1, context - round(steps)))
        steps += lengths[-1] / max(1, step_tokens - before)
    return lengths[::-1]


def _time_steps(engine: Engine, batch: int, steps: int) -> list[float]:
    seconds = []
    last = time.perf_counter()
    for _ in range(steps):
        decode_step(engine, batch)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return seconds


def decode_step(engine: Engine, batch: int) -> None:
    """One step in which each of `batch` sequences gives a token and goes on.

    Raises:
        EngineError: the batch did not stay together.
    """
    deltas = engine.step()
    if len(deltas) != batch or any(delta.finish_reason for delta in deltas):
        raise _too_small(engine, batch, f"a step gave {len(deltas)} tokens")


def end_batch(engine: Engine, names: Sequence[str]) -> None:
    """Abort these sequences and leave the engine idle."""
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()


def _too_small(engine: Engine, batch: int, seen: str) -> EngineError:
    return EngineError(
        f"the KV cache of {engine.pool.num_blocks} blocks is too small for a decode batch of "
        f"{batch}: {seen}"
    )
