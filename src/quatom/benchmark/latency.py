"""Latencies of requests under load, and how a batch developed while they ran."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)
MAX_POINTS = 60
"""Points of a timeline that a result file keeps."""


@dataclass(slots=True, kw_only=True)
class RequestTimes:
    """One request: seconds on any one clock."""

    arrival: float
    input_tokens: int
    first_token: float | None = None
    last_token: float | None = None
    output_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class Timeline:
    """State of an engine over time, one sample a step or a poll."""

    samples: list[tuple[float, int, int, float]] = field(default_factory=list)
    """(seconds, running, waiting, share of KV blocks in use)."""

    @property
    def max_running(self) -> int | None:
        """Most sequences that ran at once; None without samples."""
        return max((running for _, running, _, _ in self.samples), default=None)

    @property
    def max_kv_usage(self) -> float | None:
        """Largest share of KV blocks in use; None without samples."""
        usage = max((usage for *_, usage in self.samples), default=None)
        return None if usage is None else round(usage, 4)

    def mean_running(self) -> float | None:
        """Sequences that ran, averaged over time: each sample holds until the next."""
        if len(self.samples) < 2:
            return None
        seconds, running, _, _ = (np.array(column) for column in zip(*self.samples, strict=True))
        gaps = np.diff(seconds)
        return round(float((running[:-1] * gaps).sum() / gaps.sum()), 1)

    def thinned(self, most: int = MAX_POINTS) -> dict[str, list[float]]:
        """At most `most` samples, evenly spread with the first and the last, by column."""
        count = len(self.samples)
        picks = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
        rows = [self.samples[i] for i in picks]
        return {
            "seconds": [round(row[0], 2) for row in rows],
            "running": [row[1] for row in rows],
            "waiting": [row[2] for row in rows],
            "kv_usage": [round(row[3], 3) for row in rows],
        }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds, linear between ranks; None of nothing."""
    if not len(seconds):
        return None
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, values, strict=True)}


def summarize_latencies(
    requests: Sequence[RequestTimes], intervals: Sequence[float]
) -> dict[str, dict[str, float] | None]:
    """The latency keys of a result entry.

    ttft: arrival to first token; tpot: mean time between the tokens of a request; itl: every time
    between two tokens; e2e: arrival to last token. Failed requests have none.
    """
    done = [r for r in requests if r.error is None]
    ttft, tpot, e2e = [], [], []
    for r in done:
        if r.first_token is None or r.last_token is None:
            continue
        ttft.append(r.first_token - r.arrival)
        e2e.append(r.last_token - r.arrival)
        if r.output_tokens > 1:
            tpot.append((r.last_token - r.first_token) / (r.output_tokens - 1))
    return {
        "ttft_ms": percentiles_ms(ttft),
        "tpot_ms": percentiles_ms(tpot),
        "itl_ms": percentiles_ms(intervals),
        "e2e_ms": percentiles_ms(e2e),
    }
