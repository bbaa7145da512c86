"""Prometheus metrics, under vLLM's names where the meaning is the same, for existing dashboards.

Others begin with `quatom:`. Every metric carries the label model_name.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quatom.engine.outputs import SequenceDelta
from quatom.serving.async_engine import AsyncEngine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class EngineCollector(Collector):
    """Reads the engine's state when it is asked."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Gauges and counters that the engine keeps itself."""
        engine = self._engine
        stats, facts = engine.stats, engine.facts
        gauges = (
            ("vllm:num_requests_running", "Sequences that run.", stats.running),
            ("vllm:num_requests_waiting", "Sequences that wait.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_usage),
            ("quatom:engine_up", "1 while the engine takes requests.", engine.error is None),
        )
        counters = (
            ("vllm:num_preemptions", "Sequences set back.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits),
            ("quatom:engine_hangs", "Times it made no progress.", engine.num_hangs),
            ("quatom:engine_restarts", "Times it was started anew.", engine.num_restarts),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        limits = {
            "model_name": self._model_name,
            "block_size": str(facts.block_size),
            "num_gpu_blocks": str(facts.num_blocks),
            "kv_cache_bytes": str(facts.kv_cache_bytes),
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Limits of the KV cache.", labels=list(limits)
        )
        info.add_metric(list(limits.values()), 1)
        yield info


class Metrics:
    """Counts and latencies of requests, and the state of their engine."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine, model_name))
        self._model_name = model_name

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"vllm:{name}", text, ["model_name"], registry=self._registry)
            return made.labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            made = Histogram(
                f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
            )
            return made.labels(model_name)

        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of requests that began to answer."
        )
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Completions that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._itl = histogram("inter_token_latency_seconds", "Between tokens.")
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time between a completion's tokens."
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self._queue = histogram("request_queue_time_seconds", "Arrival to first step.")
        self._prefill = histogram("request_prefill_time_seconds", "First step to first token.")
        self._decode = histogram("request_decode_time_seconds", "First to last token.")
        self._inference = histogram("request_inference_time_seconds", "First step to last token.")
        self._lengths = histogram("request_prompt_tokens", "Prompt length.", TOKENS)
        self._outputs = histogram("request_generation_tokens", "Output length.", TOKENS)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def observe(self, deltas: list[SequenceDelta]) -> None:
        """Count one step."""
        self._generation_tokens.inc(sum(len(delta.token_ids) for delta in deltas))
        for delta in deltas:
            if delta.finish_reason is None and delta.interval is not None:
                self._itl.observe(delta.interval)  # nearly every delta: no more to count
            else:
                self._observe_first_or_last(delta)

    def _observe_first_or_last(self, delta: SequenceDelta) -> None:
        times = delta.times
        if delta.finish_reason is not None:
            self._success.labels(self._model_name, delta.finish_reason).inc()
        if times is None or times.last_token is None or times.first_token is None:
            return
        if delta.finish_reason == "error":  # its tokens have been counted, and it has no latency
            return
        if delta.interval is not None:
            self._itl.observe(delta.interval)
        else:
            self._ttft.observe(times.first_token - times.arrival)
            if delta.index == 0:
                self._prompt_tokens.inc(delta.num_prompt)
        if delta.finish_reason is not None:
            self._e2e.observe(times.last_token - times.arrival)
            self._decode.observe(times.last_token - times.first_token)
            if times.scheduled is not None:
                self._queue.observe(times.scheduled - times.arrival)
                self._prefill.observe(times.first_token - times.scheduled)
                self._inference.observe(times.last_token - times.scheduled)
            if delta.num_generated > 1:
                span = times.last_token - times.first_token
                self._tpot.observe(span / (delta.num_generated - 1))
            self._lengths.observe(delta.num_prompt)
            self._outputs.observe(delta.num_generated)
