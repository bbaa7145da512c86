"""Where the time of an engine step goes, beside the least time that each part could take.

Kernels overlap: with programmatic dependent launch one starts while its predecessor still runs and
waits for it. So a kernel is charged from the end of those that started before it, not from its own
start, and what nobody covers is idle time. The parts then add up to the step.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from quatom.benchmark.fixed_batch import (
    SETTLE,
    decode_step,
    end_batch,
    fill_batch,
    longest_sequence,
)
from quatom.benchmark.roofline import Ceilings, Queries, Roofline, Work
from quatom.benchmark.serving_results import make_entry
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.startup import greedy
from quatom.errors import EngineError
from quatom.loading import LoadedModel

PARTS = {
    "linears": r"linear_hopper|_linear_kernel|_scale_kernel|_dequantize_kernel",
    "attention": r"^(decode|merge)$|_(attention|prefill|merge|gather)_kernel|flash|fmha|splitk",
    "norm, reorder, quantize": r"quantize|norm|gated",
    "rope, append": r"rope_append",
    "matrix products of cuBLAS": r"nvjet|gemm|cutlass|xmma|cublas",
}
"""Parts of a step and the kernels that belong to them; the first that matches. cuBLAS multiplies
the output head, and every linear of a recipe that leaves weights or activations in 16 bits."""
REST = "sampling, copies, rest"
IDLE = "idle"


def profile_steps(
    loaded: LoadedModel,
    *,
    model: str,
    batches: Sequence[int],
    context: int,
    prefill_tokens: int,
    ceilings: Ceilings,
    kv_cache_memory: int,
    steps: int = 8,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Entries of serving-GPU.json, mode "profile": decode steps and a prefill step.

    Args:
        loaded: the model, on a GPU.
        model: its name in the result file.
        batches: sequences of the decode steps.
        context: tokens of each in the middle of the steps that are measured, nearly; also the
            length of the prefill's prompts.
        prefill_tokens: tokens of the prefill step.
        ceilings: of the GPU.
        kv_cache_memory: bytes of KV cache.
        steps: steps that are averaged.
        report: called with each line of a table.

    Raises:
        EngineError: there is no GPU, or the cache does not hold the batch.
    """
    if loaded.device.type != "cuda":
        raise EngineError("a step is profiled on a GPU: the model is on the CPU")
    prompts = -(-(steps + 4) * prefill_tokens // context)
    config = EngineConfig(
        max_num_seqs=max(*batches, prompts),
        max_num_batched_tokens=max(prefill_tokens, *batches, prompts),
        max_model_len=longest_sequence(context, steps, 1),
        kv_cache_memory=kv_cache_memory,
        prefix_caching=False,
        forecast_admission=False,  # a batch that the cache does not hold is an error
    )
    engine = Engine(loaded, config)
    roofline = Roofline.of(loaded.plan, ceilings)
    entries = []
    for batch in (*batches, None):
        if batch is None:
            parts = _profile_prefill(engine, prompts, context, steps)
            sampled = prefill_tokens / context
            work = Work(1, sampled, (Queries(0, context, sampled),))
        else:
            parts = _profile_decode(engine, batch, context, steps)
            work = Work.decode(batch, context)
        limit = {part: 1e3 * seconds for part, seconds in roofline.phases(work).items()}
        milliseconds = sum(parts.values())
        kind = "prefill" if batch is None else "decode"
        entry = make_entry(
            mode="profile",
            model=model,
            recipe=loaded.recipe.name,
            gpu_memory_gb=None,
            workload=f"{kind} step",
            batch=batch,
            step_tokens=batch or prefill_tokens,
            context=context,
            milliseconds=round(milliseconds, 4),
            parts_ms={part: round(value, 4) for part, value in parts.items()},
            limit_ms={part: round(value, 4) for part, value in limit.items()},
            share_of_limit=round(sum(limit.values()) / milliseconds, 4),
        )
        entries.append(entry)
        report(
            f"{model} {loaded.recipe.name}, {kind} of {entry['step_tokens']} tokens: "
            f"{milliseconds:.2f} ms, limit {sum(limit.values()):.2f} ms"
        )
        for part, value in parts.items():
            report(f"  {part:28s}{value:8.3f} ms")
    return entries


def charge(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Time of each part, from (name, start, end) of kernels.

    A moment in which several run belongs to the one that has run longest.
    """
    charged = dict.fromkeys((*PARTS, REST, IDLE), 0.0)
    waiting = sorted(kernels, key=lambda kernel: kernel[1])
    covered = waiting[0][1] if waiting else 0.0
    for name, start, end in waiting:
        charged[IDLE] += max(start - covered, 0.0)
        charged[part_of(name)] += max(end - max(start, covered), 0.0)
        covered = max(covered, end)
    return charged


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to, by its name."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel)), REST)


def _profile_decode(engine: Engine, batch: int, context: int, steps: int) -> dict[str, float]:
    names = fill_batch(engine, batch, context - SETTLE - steps // 2, seed=0)
    for _ in range(SETTLE):  # past the first steps, the next one is always launched ahead
        engine.step()
    parts = _profile(lambda: decode_step(engine, batch), steps)
    end_batch(engine, names)
    return parts


def _profile_prefill(engine: Engine, prompts: int, context: int, steps: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    for i in range(prompts):
        prompt = torch.randint(engine.model_config.vocab_size, (context,), generator=generator)
        engine.add_request(f"prefill-{i}", prompt.tolist(), greedy(1))
    for _ in range(2):
        engine.step()
    parts = _profile(engine.step, steps)
    while engine.has_work:
        engine.step()
    return parts


def _profile(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step, `steps` steps averaged."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in measured.events() or []
        if event.device_type.name == "CUDA"
    ]
    if not kernels:
        raise EngineError(f"the profiler saw no kernels in {elapsed:.3f} s")
    return {part: value / 1e3 / steps for part, value in charge(kernels).items()}
