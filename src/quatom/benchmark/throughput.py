"""`quatom bench throughput`: an engine in this process, all requests at once, or fixed batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from quatom.benchmark.fixed_batch import (
    BatchTiming,
    largest_batch,
    longest_sequence,
    measure_batches,
)
from quatom.benchmark.latency import percentiles_ms, summarize_latencies
from quatom.benchmark.offline_run import run_offline
from quatom.benchmark.roofline import Ceilings, Roofline
from quatom.benchmark.serving_results import make_entry
from quatom.benchmark.workloads import Workload, random_prompts
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.startup import (
    GIB,
    MIN_MODEL_LEN,
    build_engine,
    bytes_in_use,
)
from quatom.loading import LoadedModel

MOST_SEQUENCES = 1024
"""Upper bound of the batch that "max" finds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every measurement of one model shares."""

    loaded: LoadedModel
    model: str
    """As result files call it."""
    gpu_memory: float | None
    """GiB for everything; None: the engine's own default."""
    config: EngineConfig
    ceilings: Ceilings | None
    """None: no share of a limit is reported."""

    @property
    def roofline(self) -> Roofline | None:
        """The model's limits, where ceilings are known."""
        if self.ceilings is None:
            return None
        return Roofline.of(self.loaded.plan, self.ceilings)


def measure_throughput(setting: Setting, workload: Workload, seed: int = 0) -> dict[str, Any]:
    """Run a workload once, after a warm-up, and describe it: an entry of serving-GPU.json.

    Raises:
        EngineError: the budget does not hold the model and one request.
    """
    config = replace(
        setting.config,
        prefix_caching=False,
        max_num_seqs=min(setting.config.max_num_seqs, len(workload.lengths)),
        max_model_len=max(workload.longest, MIN_MODEL_LEN),
    )
    engine = build_engine(setting.loaded, config, setting.gpu_memory)
    prompts = random_prompts(workload, setting.loaded.config.vocab_size, seed)
    run = run_offline(engine, prompts, [count for _, count in workload.lengths])
    output = sum(request.output_tokens for request in run.requests)
    return _entry(
        setting,
        engine,
        mode="latency" if len(workload.lengths) == 1 else "throughput",
        **workload.describe(),
        output_tokens_per_s=round(output / run.seconds, 1),
        total_tokens_per_s=round((output + workload.input_tokens) / run.seconds, 1),
        **summarize_latencies(run.requests, run.intervals),
        max_running=run.timeline.max_running,
        mean_running=run.timeline.mean_running(),
        share_of_limit=_share_of_run(setting, engine, workload, run.seconds),
        seconds=round(run.seconds, 3),
        steps=run.steps,
        preemptions=run.preemptions,
        max_kv_usage=run.timeline.max_kv_usage,
        timeline=run.timeline.thinned(),
    )


def measure_fixed_batches(
    setting: Setting, batches: Sequence[int | None], context: int, steps: int = 24, seed: int = 0
) -> list[dict[str, Any]]:
    """Decode steadily at each batch size that fits: entries of serving-GPU.json.

    Args:
        setting: model, budget and limits; max_num_seqs is set by the batches.
        batches: sizes; None: as many sequences as fit ("equal memory"). Those that do not fit into
            the budget have no entry.
        context: cached tokens of each sequence.
        steps: decode steps that are timed.
        seed: of the prompts.

    Raises:
        EngineError: the budget does not hold the model and one sequence.
    """
    bound = _most_that_could_fit(setting, context)
    most = min(bound, max(batch or bound for batch in batches))
    config = replace(
        setting.config,
        prefix_caching=False,
        max_num_seqs=most,
        max_num_batched_tokens=max(setting.config.max_num_batched_tokens, 2 * most),
        max_model_len=longest_sequence(context, steps, len(batches) + 1),
        forecast_admission=False,  # `largest_batch` knows what fits, to the block
    )
    engine = build_engine(setting.loaded, config, setting.gpu_memory)
    fits = largest_batch(engine, context, steps)
    sizes = {batch or fits for batch in batches if (batch or fits) <= fits}
    timings = {t.batch: t for t in measure_batches(engine, sorted(sizes), context, steps, seed)}
    return [
        _batch_entry(setting, engine, timings[batch or fits], context, equal_memory=batch is None)
        for batch in batches
        if (batch or fits) in timings
    ]


def _batch_entry(
    setting: Setting, engine: Engine, timing: BatchTiming, context: int, *, equal_memory: bool
) -> dict[str, Any]:
    roofline, mean = setting.roofline, fmean(timing.step_seconds)
    latency = percentiles_ms(timing.step_seconds)
    limit = None if roofline is None else roofline.decode_step(timing.batch, timing.context)
    return _entry(
        setting,
        engine,
        mode="batch",
        comparison="equal memory" if equal_memory else "equal batch",
        batch=timing.batch,
        workload=f"decode at {context}",
        requests=timing.batch,
        input_tokens=context,
        output_tokens=len(timing.step_seconds),
        context=round(timing.context, 1),
        output_tokens_per_s=round(timing.tokens_per_second, 1),
        itl_ms=latency,
        max_running=timing.batch,
        share_of_limit=None if limit is None else round(limit / mean, 4),
        seconds=round(sum(timing.step_seconds), 4),
    )


def _entry(setting: Setting, engine: Engine, **measured: Any) -> dict[str, Any]:
    loaded, config = setting.loaded, engine.config
    return make_entry(
        model=setting.model,
        recipe=loaded.recipe.name,
        gpu_memory_gb=setting.gpu_memory,
        **measured,
        gpu_memory_used_gb=round(bytes_in_use(loaded) / GIB, 2),
        kv_tokens=engine.pool.num_blocks * config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        backend=loaded.backend_name,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def _share_of_run(
    setting: Setting, engine: Engine, workload: Workload, seconds: float
) -> float | None:
    """Least time of the workload, at the concurrency that the memory allows, over `seconds`."""
    roofline = setting.roofline
    if roofline is None:
        return None
    count = len(workload.lengths)
    resident = (workload.input_tokens + workload.output_tokens / 2) / count
    fits = engine.pool.num_blocks * engine.config.block_size / resident
    concurrent = min(count, engine.config.max_num_seqs, fits)
    return round(roofline.run(list(workload.lengths), concurrent) / seconds, 4)


def _most_that_could_fit(setting: Setting, context: int) -> int:
    """Sequences that would fit if nothing but weights took memory; an upper bound."""
    if setting.gpu_memory is None:
        return MOST_SEQUENCES
    roofline = Roofline.of(setting.loaded.plan, Ceilings(1.0, 1.0, 1.0))
    free = setting.gpu_memory * GIB - roofline.linear_bytes
    return min(MOST_SEQUENCES, max(1, int(free / (context * roofline.kv_bytes))))
