"""The kernel benchmark: ratios and picture from rows, and what it refuses."""

import json
from pathlib import Path

import pytest

from quatom.benchmark.kernel_plot import plot_kernels
from quatom.benchmark.kernels import Run, _add_ratios, run_kernel_bench
from quatom.benchmark.timing import Timing
from quatom.errors import BackendError, RecipeError

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "kernels-h100.json"


def row(scheme, microseconds, m=16, **more):
    return {
        "op": "linear",
        "scheme": scheme,
        "backend": "peer" if scheme.startswith("peer") or scheme == "bf16" else "cuda",
        "m": m,
        "n": 4096,
        "k": 4096,
        "microseconds": microseconds,
        "tops": 2 * m * 4096 * 4096 / microseconds / 1e6,
    } | more


def test_ratios_are_to_the_same_size_and_to_the_faster_humming():
    rows = [
        row("w4a4", 5.0),
        row("bf16", 20.0),
        row("bf16", 90.0, m=64),
        row("peer:humming-w4a8-fp8", 12.0),
        row("peer:humming-w4a8-int8", 10.0),
        row("w4a4", 9.0, m=64),
        {"op": "silu_quantize", "scheme": "int4", "m": 16, "k": 4096, "microseconds": 2.0},
    ]
    _add_ratios(rows)
    assert (rows[0]["ratio_bf16"], rows[0]["ratio_humming"]) == (4.0, 2.0)
    assert (rows[5]["ratio_bf16"], rows[5]["ratio_humming"]) == (10.0, None)
    assert "ratio_bf16" not in rows[6]


def test_an_entry_counts_operations_and_the_least_bytes():
    run = Run("w4a4", "cuda", [], least_bytes=9_000_000)
    entry = run.entry(16, (4096, 8192), Timing(10.0, 9.0, 12.0), copy_tb_s=3.0)
    assert (entry["m"], entry["n"], entry["k"]) == (16, 4096, 8192)
    assert entry["tops"] == 107.4  # 2 * 16 * 4096 * 8192 operations in 10 us
    assert entry["share_of_copy"] == 0.3  # 9 MB take 3 us at 3 TB/s
    assert (entry["p10"], entry["microseconds"], entry["p90"]) == (9.0, 10.0, 12.0)


def test_the_plot_needs_no_peer(tmp_path):
    rows = [row("w4a4", 5.0), row("w4a4", 9.0, m=64)]
    plot_kernels(rows, {"copy_tb_s": 3.0, "fp8_tflops": 1400.0}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_committed_results_have_the_agreed_form():
    content = json.loads(RESULT.read_text())
    assert content["format"] == 1
    assert {"commit", "date", "gpu", "copy_tb_s"} <= content["environment"].keys()
    keys = {"op", "scheme", "backend", "m", "n", "k", "microseconds", "p10", "p90", "share_of_copy"}
    for entry in content["results"]:
        assert keys <= entry.keys()
        assert entry["p10"] <= entry["microseconds"] <= entry["p90"]
        if entry["op"] == "linear" and entry["backend"] in ("cuda", "triton"):
            assert entry["relative_error"] <= 2e-3


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(RecipeError, match="unknown benchmark op 'gemm'; known: all, linear"):
        run_kernel_bench("gemm")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match="needs an sm_90 GPU"):
        run_kernel_bench()
