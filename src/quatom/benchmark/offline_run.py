"""Run requests through an engine in this process, all queued at once, and time them."""

import time
from dataclasses import dataclass

from quatom.benchmark.latency import RequestTimes, Timeline
from quatom.engine.engine import Engine
from quatom.engine.outputs import SequenceDelta
from quatom.engine.startup import greedy
from quatom.errors import EngineError


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """What happened."""

    requests: list[RequestTimes]
    intervals: list[float]
    """Seconds between a token and the next, of all requests."""
    timeline: Timeline
    seconds: float
    """From the first request queued to the last token."""
    preemptions: int
    steps: int


def run_offline(engine: Engine, prompts: list[list[int]], output_tokens: list[int]) -> OfflineRun:
    """Generate `output_tokens[i]` tokens, greedy and past any end, for each prompt.

    Raises:
        EngineError: a request failed.
    """
    made = [
        engine.make_request(f"run-{i}", prompt, greedy(count))
        for i, (prompt, count) in enumerate(zip(prompts, output_tokens, strict=True))
    ]
    times = {
        request.request_id: RequestTimes(arrival=0.0, input_tokens=len(prompt))
        for request, prompt in zip(made, prompts, strict=True)
    }
    intervals: list[float] = []
    timeline = Timeline()
    preemptions, steps = engine.scheduler.num_preemptions, 0
    start = time.monotonic()
    for request in made:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            if delta.interval is not None:
                intervals.append(delta.interval)
            if delta.finish_reason is not None:
                _record(times[delta.request_id], delta, start)
        steps += 1
        scheduler = engine.scheduler
        timeline.samples.append(
            (
                time.monotonic() - start,
                len(scheduler.running),
                len(scheduler.waiting),
                engine.pool.usage,
            )
        )
    return OfflineRun(
        requests=list(times.values()),
        intervals=intervals,
        timeline=timeline,
        seconds=time.monotonic() - start,
        preemptions=engine.scheduler.num_preemptions - preemptions,
        steps=steps,
    )


def _record(times: RequestTimes, delta: SequenceDelta, start: float) -> None:
    clock = delta.times
    if delta.error is not None or clock is None:
        raise EngineError(f"{delta.request_id} failed during the benchmark: {delta.error}")
    if clock.first_token is None or clock.last_token is None:
        raise EngineError(f"{delta.request_id} ended without a token ({delta.finish_reason})")
    times.first_token = clock.first_token - start
    times.last_token = clock.last_token - start
    times.output_tokens = delta.num_generated
