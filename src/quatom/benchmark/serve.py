"""`quatom bench serve`: latencies and throughput of a server under load, over HTTP alone."""

from typing import Any

import httpx

from quatom.benchmark.http_load import LoadRun, Target, run_load
from quatom.benchmark.latency import summarize_latencies
from quatom.benchmark.serving_results import make_entry
from quatom.benchmark.workloads import (
    Workload,
    fixed_lengths,
    poisson_arrivals,
    random_prompts,
)
from quatom.errors import EngineError

PROMPT_IDS = 256
"""Random prompts draw from so many token ids: every model has them."""
WARM_UP_TOKENS = 16


def find_model(url: str, api_key: str | None) -> str:
    """The first model that a server names.

    Raises:
        EngineError: it does not answer as a server of this kind.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30.0)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{url}/v1/models gave no model ({error})") from error


def measure_serving(
    target: Target,
    workload: Workload,
    *,
    model: str,
    recipe: str,
    gpu_memory: float | None = None,
    concurrency: int | None = None,
    request_rate: float | None = None,
    client_processes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Send a workload to a server and describe what came: an entry of serving-GPU.json.

    Args:
        target: the server.
        workload: lengths of the requests.
        model: as result files call it.
        recipe: the same.
        gpu_memory: GiB that the server was given.
        concurrency: closed loop with so many users.
        request_rate: open loop: Poisson arrivals of so many requests a second.
        client_processes: that send the requests; None: as `run_load` chooses.
        seed: of prompts and arrivals.

    Raises:
        EngineError: not exactly one of concurrency and request_rate is given, or every request
            failed.
    """
    if (concurrency is None) == (request_rate is None):
        raise EngineError("give either a concurrency or a request rate")
    count = len(workload.lengths)
    _warm_up(target, min(concurrency or 8, count))
    arrivals = None
    if request_rate is not None:
        arrivals = poisson_arrivals(request_rate, count, seed)
    run = run_load(
        target,
        random_prompts(workload, PROMPT_IDS, seed),
        [output for _, output in workload.lengths],
        concurrency=concurrency,
        arrivals=arrivals,
        processes=client_processes,
    )
    _check_not_all_failed(run)
    output = sum(r.output_tokens for r in run.requests)
    answered = sum(r.input_tokens for r in run.requests if r.error is None)
    return make_entry(
        mode="serve",
        model=model,
        recipe=recipe,
        gpu_memory_gb=gpu_memory,
        **workload.describe(),
        request_rate=request_rate,
        concurrency=concurrency,
        output_tokens_per_s=round(output / run.seconds, 1),
        total_tokens_per_s=round((output + answered) / run.seconds, 1),
        requests_per_s=round((count - len(run.errors)) / run.seconds, 3),
        **summarize_latencies(run.requests, run.intervals),
        errors=len(run.errors),
        first_error=next(iter(run.errors), None),
        max_running=run.timeline.max_running,
        mean_running=run.timeline.mean_running(),
        kv_tokens=run.kv_tokens,
        max_kv_usage=run.timeline.max_kv_usage,
        preemptions=run.preemptions,
        seconds=round(run.seconds, 3),
        client_processes=run.processes,
        client_cpu_us_per_token=round(run.cpu_seconds / max(output, 1) * 1e6, 2),
        timeline=run.timeline.thinned(),
    )


def _warm_up(target: Target, requests: int) -> None:
    """Short requests that open connections and let the server run its first steps."""
    workload = fixed_lengths(requests, WARM_UP_TOKENS, WARM_UP_TOKENS)
    prompts = random_prompts(workload, PROMPT_IDS, seed=2**32 - 1)
    counts = [output for _, output in workload.lengths]
    _check_not_all_failed(run_load(target, prompts, counts, concurrency=requests))


def _check_not_all_failed(run: LoadRun) -> None:
    if len(run.errors) == len(run.requests):
        raise EngineError(f"every request failed; the first one with: {run.errors[0]}")
