"""A server's Prometheus metrics under vLLM's names, and its gauges over time."""

import re
import threading
import time
from typing import Any

import httpx

from quatom.benchmark.latency import Timeline

POLL_SECONDS = 0.25
TIMEOUT_SECONDS = 30.0
_METRIC = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_BLOCKS = re.compile(
    r'^vllm:cache_config_info\{.*?block_size="(\d+)".*?num_gpu_blocks="(\d+)"', re.M
)


def read_metrics(client: httpx.Client) -> dict[str, Any]:
    """The server's metrics by name without prefix; empty where it has none."""
    try:
        response = client.get("/metrics", timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError:
        return {}
    return parse_metrics(response.text) if response.status_code == httpx.codes.OK else {}


def parse_metrics(text: str) -> dict[str, Any]:
    """Values of an exposition under vLLM's names, "kv_tokens" from the cache's block numbers."""
    values: dict[str, Any] = {name: float(value) for name, value in _METRIC.findall(text)}
    if blocks := _BLOCKS.search(text):
        values["kv_tokens"] = int(blocks[1]) * int(blocks[2])
    return values


class Poll:
    """Samples a server's gauges in a thread, until it is left or the server proves to have none."""

    def __init__(
        self, client: httpx.Client, timeline: Timeline, start: float, seconds: float
    ) -> None:
        """Samples go to `timeline`, at seconds after `start` on the clock of time.perf_counter."""
        self._client = client
        self._timeline = timeline
        self._start = start
        self._seconds = seconds
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Poll":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        self._left.wait(self._start - time.perf_counter())
        while not self._left.is_set():
            values = read_metrics(self._client)
            if "num_requests_running" not in values:
                return
            self._timeline.samples.append(
                (
                    time.perf_counter() - self._start,
                    int(values["num_requests_running"]),
                    int(values["num_requests_waiting"]),
                    values["kv_cache_usage_perc"],
                )
            )
            self._left.wait(self._seconds)
