"""Load on an OpenAI-compatible server over HTTP: streamed completions, timed token by token.

It knows nothing of the server's process: any server that streams /v1/completions can be measured,
and one that counts under vLLM's metric names shows its batch too.
"""

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from quatom.benchmark.latency import RequestTimes, Timeline

POLL_SECONDS = 0.25
_METRIC = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_BLOCKS = re.compile(
    r'^vllm:cache_config_info\{.*?block_size="(\d+)".*?num_gpu_blocks="(\d+)"', re.M
)


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the model that it is asked for."""

    url: str
    model: str
    api_key: str | None = None

    def client(self) -> httpx.AsyncClient:
        """A client that waits as long as the server needs and opens as many connections."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )


@dataclass(slots=True)
class LoadRun:
    """What happened to a series of requests."""

    requests: list[RequestTimes]
    intervals: list[float] = field(default_factory=list)
    """Seconds between a token and the next; tokens that came together are 0 apart."""
    timeline: Timeline = field(default_factory=Timeline)
    seconds: float = 0.0
    """From the first request to the last token."""
    kv_tokens: int | None = None
    preemptions: int | None = None

    @property
    def errors(self) -> list[str]:
        """What failed requests were told."""
        return [r.error for r in self.requests if r.error is not None]


async def run_load(
    target: Target,
    prompts: Sequence[list[int]],
    output_tokens: Sequence[int],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> LoadRun:
    """Send every request and wait for the last token.

    Args:
        target: the server.
        prompts: token ids of each request.
        output_tokens: tokens to generate for each.
        concurrency: closed loop: so many users, each of whom sends a request when the last one is
            answered.
        arrivals: open loop: seconds after the start at which each request is sent, whatever has
            become of the others. A request's clock starts then, even if the client is late.
        poll_seconds: how often the server's metrics are read.
    """
    run = LoadRun([RequestTimes(arrival=0.0, input_tokens=len(prompt)) for prompt in prompts])
    async with target.client() as client:
        before = await _metrics(client)
        start = time.perf_counter()
        poll = asyncio.ensure_future(_poll(client, run.timeline, start, poll_seconds))

        async def send(i: int) -> None:
            body = _body(target.model, prompts[i], output_tokens[i])
            await _complete(client, body, output_tokens[i], run.requests[i], run.intervals, start)

        async def user(queue: deque[int]) -> None:
            while queue:
                i = queue.popleft()
                run.requests[i].arrival = time.perf_counter() - start
                await send(i)

        async def visitor(i: int, arrival: float) -> None:
            run.requests[i].arrival = arrival
            await asyncio.sleep(arrival - (time.perf_counter() - start))
            await send(i)

        if arrivals is not None:
            await asyncio.gather(*(visitor(i, at) for i, at in enumerate(arrivals)))
        else:
            queue = deque(range(len(prompts)))
            await asyncio.gather(*(user(queue) for _ in range(concurrency or 1)))
        run.seconds = time.perf_counter() - start
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)
        after = await _metrics(client)
    run.kv_tokens = after.get("kv_tokens")
    if "num_preemptions_total" in after:
        counted = after["num_preemptions_total"] - before.get("num_preemptions_total", 0)
        run.preemptions = int(counted)
    return run


def _body(model: str, prompt: list[int], count: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def _complete(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    wanted: int,
    times: RequestTimes,
    intervals: list[float],
    start: float,
) -> None:
    """Stream one completion into `times` and `intervals`; a failure is kept as its error."""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                times.error = f"HTTP {response.status_code}: {text[:200]}"
                return
            buffer = b""
            async for data in response.aiter_bytes():
                now = time.perf_counter() - start
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    _count(event, now, times, intervals)
    except httpx.HTTPError as error:
        times.error = f"{type(error).__name__}: {error}"
    if times.error is None and times.output_tokens != wanted:
        times.error = f"ended after {times.output_tokens} of {wanted} tokens"


def _count(event: bytes, now: float, times: RequestTimes, intervals: list[float]) -> None:
    """Count the tokens of one event."""
    data = event.removeprefix(b"data: ")
    if data == b"[DONE]" or not data:
        return
    content = json.loads(data)
    if "error" in content:
        times.error = str(content["error"])
        return
    for choice in content["choices"]:
        ids = choice.get("token_ids")
        count = 1 if ids is None else len(ids)  # a server that does not tell sends each token
        if not count:
            continue
        if times.last_token is None:
            times.first_token = now
        else:
            intervals.append(now - times.last_token)
        intervals.extend([0.0] * (count - 1))
        times.last_token = now
        times.output_tokens += count


async def _poll(
    client: httpx.AsyncClient, timeline: Timeline, start: float, seconds: float
) -> None:
    """Sample the server's gauges until cancelled, or until it proves to have none."""
    while True:
        values = await _metrics(client)
        if "num_requests_running" not in values:
            return
        timeline.samples.append(
            (
                time.perf_counter() - start,
                int(values["num_requests_running"]),
                int(values["num_requests_waiting"]),
                values["kv_cache_usage_perc"],
            )
        )
        await asyncio.sleep(seconds)


async def _metrics(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's metrics by name without prefix; empty where it has none."""
    try:
        response = await client.get("/metrics")
    except httpx.HTTPError:
        return {}
    return parse_metrics(response.text) if response.status_code == httpx.codes.OK else {}


def parse_metrics(text: str) -> dict[str, Any]:
    """Values of an exposition under vLLM's names, "kv_tokens" from the cache's block numbers."""
    values: dict[str, Any] = {name: float(value) for name, value in _METRIC.findall(text)}
    if blocks := _BLOCKS.search(text):
        values["kv_tokens"] = int(blocks[1]) * int(blocks[2])
    return values
