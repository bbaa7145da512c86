"""The engine's own time per step on a CPU: scheduling, batching, sampling, detokenizing.

The model is stubbed: its forward pass returns at once and its logits are made before. What remains
is what every step costs besides the model. Run as

    python -m quatom.benchmark.engine_overhead --output benchmarks/results/engine-overhead-cpu.json
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.sampling import SamplingParams
from quatom.modeling.context import ForwardContext, Stages, Stop
from quatom.presets import PRESETS
from quatom.recipe import Recipe

PROMPT_TOKENS = 1024
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8, "seed": 1},
    "top_k": {"temperature": 0.8, "top_k": 50, "seed": 1},
    "top_p": {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
"""Sampling parameters measured, by name."""


@dataclass(frozen=True, slots=True)
class StubCache:
    """A layer of KV cache that stores nothing."""

    bytes_per_block: int = 1

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Nothing to copy."""


class StubModel:
    """A model that takes no time: the same logits for every step."""

    blocks_run = 0

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(max_rows, vocab_size, generator=generator)
        self._hidden = torch.zeros(max_rows, 1)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[StubCache]:
        """One layer."""
        return [StubCache()]

    def limit_length(self, max_length: int) -> None:
        """Nothing depends on it."""

    def forward(
        self,
        input_ids: Tensor,
        context: ForwardContext,
        kv_cache: Sequence[StubCache],
        rows: Tensor | None = None,
    ) -> Tensor:
        """(M, 1) zeros."""
        return self._hidden[:1].expand((input_ids if rows is None else rows).shape[0], 1)

    def stages(
        self, input_ids: Tensor, context: ForwardContext, kv_cache: Sequence[StubCache]
    ) -> Stages:
        """One layer that attends to nothing."""
        yield from ()
        hidden = self.forward(input_ids, context, kv_cache)
        return Stop(lambda q, context, *, out=None: q, hidden, hidden)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """What came in."""
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(M, vocab); sampling may change them, so a copy would be part of the model's time."""
        return self._logits[: hidden.shape[0]]

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The same."""
        return self.compute_logits(hidden)


@dataclass(frozen=True, slots=True)
class StubLimits:
    """Sizes of the stub."""

    vocab_size: int
    hidden_size: int = 1
    max_position: int = 8192
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedStub:
    """The stub with what belongs to a model."""

    model: StubModel
    config: StubLimits
    tokenizer: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    recipe: Recipe = PRESETS["fp16"]


def stub_engine(num_seqs: int, vocab_size: int, length: int, tokenizer: Any) -> Engine:
    """An engine for `num_seqs` sequences of `length` tokens whose model takes no time."""
    model = StubModel(vocab_size, -(-num_seqs // 64) * 64)
    loaded = LoadedStub(model, StubLimits(vocab_size), tokenizer)
    limits = EngineConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048 + num_seqs,
        max_model_len=length,
        kv_cache_memory=num_seqs * (length // 32 + 2),  # the stub's blocks are one byte each
    )
    return Engine(loaded, limits)


def read_tokenizer(source: str | None) -> Any:
    """The tokenizer of a folder or file; None of None."""
    if source is None:
        return None
    from quatom.checkpoint.reader import open_source
    from quatom.checkpoint.tokenizer import tokenizer_from_source

    return tokenizer_from_source(open_source(source))


def measure(
    kind: str, *, num_seqs: int, vocab_size: int, steps: int, tokenizer: Any = None
) -> dict[str, Any]:
    """Milliseconds of a decode step of `num_seqs` sequences that hold 1024 tokens of prompt."""
    early = num_seqs * PROMPT_TOKENS // 1024  # steps in which the first decode and others prefill
    length = PROMPT_TOKENS + steps + early
    engine = stub_engine(num_seqs, vocab_size, length, tokenizer)
    params = SamplingParams(max_tokens=steps + early, **KINDS[kind])
    for i in range(num_seqs):
        prompt = [(7 * i + j) % vocab_size for j in range(PROMPT_TOKENS)]
        engine.add_request(str(i), prompt, params)
    while any(s.num_uncomputed > 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    times, cpu_times = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.thread_time()
        deltas = engine.step()
        times.append((time.perf_counter() - start) * 1e3)
        cpu_times.append((time.thread_time() - cpu_start) * 1e3)
        assert len(deltas) == num_seqs
    return {
        "mode": "engine_overhead",
        "sampling": kind,
        "sequences": num_seqs,
        "vocab_size": vocab_size,
        "detokenized": tokenizer is not None,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "load_average": round(os.getloadavg()[0], 1),
        "ms_per_step": round(statistics.median(times), 4),
        "cpu_ms_per_step": round(statistics.median(cpu_times), 4),
        "p10": round(statistics.quantiles(times, n=10)[0], 4),
        "p90": round(statistics.quantiles(times, n=10)[-1], 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every kind of sampling and write a result file."""
    parser = argparse.ArgumentParser(description="time of an engine step without the model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokenizer", help="folder or GGUF of a model whose tokenizer is used")
    parser.add_argument("--output", type=Path, help="result file")
    args = parser.parse_args(arguments)
    tokenizer = read_tokenizer(args.tokenizer)
    results = []
    for kind in KINDS:
        result = measure(
            kind,
            num_seqs=args.sequences,
            vocab_size=args.vocab_size,
            steps=args.steps if kind == "greedy" else max(20, args.steps // 10),
            tokenizer=tokenizer,
        )
        print(f"{kind:12} {result['ms_per_step']:8.3f} ms per step", file=sys.stderr)
        results.append(result)
    if args.output:
        command = command_line("python", "-m", "quatom.benchmark.engine_overhead")
        write_results(args.output, command, describe_environment(), results)


if __name__ == "__main__":
    main()
