"""Percentiles and timelines against values worked out by hand."""

import pytest

from quatom.benchmark.latency import (
    RequestTimes,
    Timeline,
    percentiles_ms,
    summarize_latencies,
)


def test_percentiles_interpolate_between_ranks():
    # 11 values 0, 10, ..., 100 ms: rank of p is p / 10.
    seconds = [i / 100 for i in range(11)]
    assert percentiles_ms(seconds[::-1]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    # Two values: p90 lies nine tenths of the way.
    assert percentiles_ms([1.0, 2.0]) == {"p50": 1500.0, "p90": 1900.0, "p99": 1990.0}
    assert percentiles_ms([]) is None


def test_latencies_by_hand():
    times = [
        RequestTimes(arrival=1.0, input_tokens=8, first_token=1.5, last_token=2.5, output_tokens=5),
        RequestTimes(arrival=2.0, input_tokens=8, first_token=2.1, last_token=2.1, output_tokens=1),
        RequestTimes(arrival=2.0, input_tokens=8, error="refused"),
    ]
    summary = summarize_latencies(times, [0.25] * 4)
    assert summary["ttft_ms"] == {"p50": 300.0, "p90": 460.0, "p99": 496.0}  # 100 and 500
    assert summary["tpot_ms"]["p50"] == 250.0  # 1 s over 4 gaps; one token has none
    assert summary["itl_ms"] == {"p50": 250.0, "p90": 250.0, "p99": 250.0}
    assert summary["e2e_ms"]["p50"] == pytest.approx(800.0)  # 100 and 1500
    assert summarize_latencies(times[2:], []) == dict.fromkeys(
        ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    )


def test_a_timeline():
    line = Timeline([(0.0, 1, 3, 0.1), (1.0, 4, 0, 0.5), (4.0, 2, 0, 0.3)])
    assert line.max_running == 4
    assert line.max_kv_usage == 0.5
    assert line.mean_running() == 3.2  # 1 for a second and 4 for three: 13 / 4, rounded to even
    assert line.thinned(2) == {
        "seconds": [0.0, 4.0],
        "running": [1, 2],
        "waiting": [3, 0],
        "kv_usage": [0.1, 0.3],
    }
    assert Timeline().max_running is None
    assert Timeline().mean_running() is None
    assert Timeline().thinned()["seconds"] == []


def test_a_long_timeline_is_thinned_evenly():
    line = Timeline([(float(i), i, 0, 0.0) for i in range(1001)])
    thinned = line.thinned(11)
    assert thinned["running"] == list(range(0, 1001, 100))
