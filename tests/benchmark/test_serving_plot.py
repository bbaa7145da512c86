"""Pictures hold every curve and bar of the entries they are drawn from."""

import pytest
from matplotlib import pyplot

from quatom.benchmark import serving_plot
from quatom.benchmark.serving_plot import plot_batches, plot_file, plot_timelines
from quatom.benchmark.serving_results import make_entry


def batch_entry(recipe, batch, *, memory=24.0, comparison="equal batch", model="m"):
    return make_entry(
        mode="batch",
        model=model,
        recipe=recipe,
        gpu_memory_gb=memory,
        comparison=comparison,
        batch=batch,
        workload="decode at 1024",
        output_tokens_per_s=100.0 * batch + memory,
        itl_ms={"p50": 10.0 + batch, "p90": 0.0, "p99": 0.0},
        share_of_limit=0.5,
    )


def run_entry(recipe, memory):
    return make_entry(
        mode="throughput",
        model="m",
        recipe=recipe,
        gpu_memory_gb=memory,
        workload="1024+512",
        requests=8,
        output_tokens_per_s=1000.0,
        timeline={"seconds": [0.0, 1.0, 2.0], "running": [4, 8, 0]},
    )


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    drawn = []
    monkeypatch.setattr(serving_plot, "_save", lambda pyplot, figure, path: drawn.append(figure))
    yield drawn
    for figure in drawn:
        pyplot.close(figure)


ENTRIES = [
    *(batch_entry("fp16", b) for b in (8, 1)),
    batch_entry("fp16", 8, memory=72.0),
    *(batch_entry("atom-w4a4kv4", b) for b in (1, 8, 64)),
    batch_entry("fp16", 12, comparison="equal memory"),
    batch_entry("atom-w4a4kv4", 91, comparison="equal memory"),
    batch_entry("atom-w4a4kv4", 300, comparison="equal memory", memory=72.0),
]


def test_curves_and_bars(figures, tmp_path):
    plot_batches(ENTRIES, "title", tmp_path / "x.png")
    (figure,) = figures
    upper, latency, bars, _ = figure.axes
    curves = {line.get_label(): line for line in upper.lines if line.get_linestyle() == "-"}
    assert list(curves) == ["FP16", "W4A4KV4"]
    # In order of batch; where two budgets hold a batch, of the larger one.
    assert curves["FP16"].get_xydata().tolist() == [[1, 124.0], [8, 872.0]]
    assert curves["W4A4KV4"].get_xdata().tolist() == [1, 8, 64]
    limits = [line for line in upper.lines if line.get_linestyle() == "--"]
    assert limits[0].get_ydata().tolist() == [248.0, 1744.0]
    assert latency.lines[0].get_ydata().tolist() == [11.0, 18.0]
    assert not [line for line in latency.lines if line.get_linestyle() == "--"]
    assert sorted(patch.get_height() for patch in bars.patches) == [1224.0, 9124.0, 30072.0]
    assert {text.get_text() for text in bars.texts} == {"batch 12", "batch 91", "batch 300"}
    assert "Equal batch" in upper.get_title()
    assert "Equal memory" in bars.get_title()


def test_timelines(figures, tmp_path):
    entries = [run_entry("fp16", 24.0), run_entry("atom-w4a4kv4", 24.0), run_entry("fp16", 72.0)]
    plot_timelines(entries, "title", tmp_path / "x.png")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [
        "24 GiB, 1024+512 tokens",
        "72 GiB, 1024+512 tokens",
    ]
    assert [len(axis.lines) for axis in axes] == [2, 1]
    assert axes[0].lines[1].get_label() == "W4A4KV4, 8 requests, 1000 tokens/s"


def test_a_file_makes_a_picture_of_each_kind_and_model(tmp_path):
    entries = [*ENTRIES, batch_entry("fp16", 1, model="n"), run_entry("fp16", 24.0)]
    paths = plot_file(entries, {"cpu": "a CPU"}, tmp_path / "out", "serving-x")
    assert [path.name for path in paths] == [
        "serving-x-m-batch.png",
        "serving-x-m-time.png",
        "serving-x-n-batch.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_engines_have_one_picture_with_a_panel_for_each_shape(figures, tmp_path):
    fp8 = run_entry("fp8", 24.0) | {"engine": "vllm", "vllm": "0.26.0"}
    del fp8["timeline"]  # which vLLM does not tell
    plugin = fp8 | {"engine": "vllm+quatom", "recipe": "quatom-w4a8kv4"}
    entries = [fp8, plugin | {"output_tokens_per_s": 1500.0}, run_entry("quatom-w4a8kv4", 72.0)]
    assert plot_file(entries, {"gpu": "H200"}, tmp_path, "vllm-x") == [
        tmp_path / "vllm-x-engines.png"
    ]
    upper, lower = figures[0].axes
    assert [patch.get_width() for patch in lower.patches] == [1000.0, 1500.0]
    assert [label.get_text() for label in lower.get_yticklabels()] == [
        "vLLM 0.26.0, FP8",
        "vLLM 0.26.0 + Quatom, W4A8KV4",
    ]
    assert [label.get_text() for label in upper.get_yticklabels()] == ["Quatom, W4A8KV4"]
    assert lower.get_title() == "m, 24 GiB, 8 requests of 1024+512 tokens"
