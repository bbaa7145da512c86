"""Pictures of serving results: by batch, at equal batch and at equal memory, and over time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]

SERIES = (
    ("fp16", "FP16", "black", "d"),
    ("w8a8", "W8A8", "tab:blue", "^"),
    ("w4a16", "W4A16", "tab:green", "v"),
    ("atom-w4a4kv4", "W4A4KV4", "tab:red", "o"),
    ("atom-w4a8kv4", "W4A8KV4", "tab:orange", "s"),
    ("quatom-w4a4kv4", "W4A4KV4, rotated", "tab:purple", "P"),
    ("quatom-w4a8kv4", "W4A8KV4, rotated", "tab:brown", "X"),
)
"""Recipe, label, colour and marker of each curve."""


def plot_file(results: Sequence[Entry], environment: Entry, folder: Path, stem: str) -> list[Path]:
    """Draw what a result file holds, a picture of each kind for each model; returns the files.

    Fixed batches make `STEM-MODEL-batch.png`, whole runs `STEM-MODEL-time.png`. Several engines
    make one picture of all models, `STEM-engines.png`.
    """
    gpu = environment.get("gpu") or environment["cpu"]
    paths = []
    if any("engine" in entry for entry in results):
        path = folder / f"{stem}-engines.png"
        plot_engines(results, gpu, path)
        return [path]
    for model in sorted({entry["model"] for entry in results}):
        rows = [entry for entry in results if entry["model"] == model]
        kinds: tuple[tuple[str, str, Callable[..., None]], ...] = (
            ("batch", "batch", plot_batches),
            ("throughput", "time", plot_timelines),
        )
        for mode, suffix, draw in kinds:
            chosen = [entry for entry in rows if entry["mode"] == mode]
            if chosen:
                path = folder / f"{stem}-{model}-{suffix}.png"
                draw(chosen, f"{model}, {gpu}", path)
                paths.append(path)
    return paths


def plot_batches(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Throughput and latency of decoding.

    The upper row at equal batch, where a curve ends with the largest batch that fits and dashes are
    the roofline; the lower row at equal memory, each recipe at its own largest batch.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.6))
    equal_batch = [e for e in entries if e["comparison"] == "equal batch"]
    for axis, value, label in (
        (axes[0][0], _tokens_per_second, "tokens/s"),
        (axes[0][1], _milliseconds, "ms per token"),
    ):
        for recipe, name, color, marker in SERIES:
            points = _largest_budget(e for e in equal_batch if e["recipe"] == recipe)
            batches = [e["batch"] for e in points]
            if points:
                style = {"label": name, "color": color, "marker": marker}
                axis.plot(batches, [value(e) for e in points], **style)
            if points and all(e["share_of_limit"] for e in points) and value is _tokens_per_second:
                limits = [value(e) / e["share_of_limit"] for e in points]
                axis.plot(batches, limits, color=color, linestyle="--", alpha=0.4)
        axis.set(title=f"Equal batch: {label}", xlabel="batch", yscale="log")
        axis.set_xscale("log", base=2)
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    equal_memory = [e for e in entries if e["comparison"] == "equal memory"]
    _bars(axes[1][0], equal_memory, _tokens_per_second, "tokens/s")
    _bars(axes[1][1], equal_memory, _milliseconds, "ms per token")
    figure.suptitle(f"{title}, {entries[0]['workload']} cached tokens")
    _save(pyplot, figure, path)


def plot_timelines(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Sequences that run over the seconds of a run, a panel for each budget and workload."""
    pyplot = _pyplot()
    panels = sorted({(_budget(e), e["workload"]) for e in entries})
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 3.4 * len(panels)), squeeze=False, constrained_layout=True
    )
    for axis, (budget, workload) in zip(axes.flat, panels, strict=True):
        for recipe, name, color, _ in SERIES:
            for e in entries:
                if (e["recipe"], _budget(e), e["workload"]) == (recipe, budget, workload):
                    line = e["timeline"]
                    rate = f"{e['output_tokens_per_s']:.0f} tokens/s"
                    label = f"{name}, {e['requests']} requests, {rate}"
                    axis.plot(line["seconds"], line["running"], label=label, color=color)
        memory = f"{budget:g} GiB, " if budget else ""
        axis.set(title=f"{memory}{workload} tokens", xlabel="seconds", ylabel="sequences running")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    _save(pyplot, figure, path)


def plot_engines(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Output tokens per second of engines within the same memory, a panel for each model."""
    pyplot = _pyplot()
    entries = [entry for entry in entries if entry["mode"] == "throughput"]
    panels = sorted({_conditions(entry) for entry in entries}, reverse=True)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 1.9 * len(panels)), squeeze=False, constrained_layout=True
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        rows = [entry for entry in entries if _conditions(entry) == panel]
        rows.sort(key=_tokens_per_second)
        names, colors = zip(*(_engine_style(entry) for entry in rows), strict=True)
        drawn = axis.barh(names, [_tokens_per_second(entry) for entry in rows], color=colors)
        axis.bar_label(drawn, [f"{_tokens_per_second(e):,.0f}" for e in rows], padding=3)
        axis.margins(x=0.12)
        model, memory, gpus, workload = panel
        several = f"{gpus} GPUs, " if gpus > 1 else ""
        axis.set_title(f"{model}, {several}{memory:g} GiB, {workload}", fontsize=10)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axes.flat[-1].set_xlabel("output tokens/s")
    figure.suptitle(title)
    _save(pyplot, figure, path)


def _conditions(entry: Entry) -> tuple[str, float, int, str]:
    workload = f"{entry['requests']} requests of {entry['workload']} tokens"
    return entry["model"], _budget(entry), entry.get("tensor_parallel", 1), workload


def _engine_style(entry: Entry) -> tuple[str, str]:
    """Label and colour of an engine's bar."""
    formats = {recipe: name for recipe, name, _, _ in SERIES} | {"fp8": "FP8"}
    recipe = str(entry["recipe"])
    what = formats.get(recipe, recipe).partition(",")[0]
    engine, color = {
        "vllm": (f"vLLM {entry.get('vllm')}", "tab:gray"),
        "vllm+quatom": (f"vLLM {entry.get('vllm')} + Quatom", "tab:orange"),
    }.get(entry.get("engine", ""), ("Quatom", "tab:brown"))
    return f"{engine}, {what}", color


def _bars(axis: Any, entries: Sequence[Entry], value: Callable[[Entry], float], label: str) -> None:
    """One group of bars for each budget, each bar labelled with its batch."""
    budgets = sorted({_budget(e) for e in entries})
    present = [s for s in SERIES if any(e["recipe"] == s[0] for e in entries)]
    width = 0.8 / max(len(present), 1)
    for i, (recipe, name, color, _) in enumerate(present):
        bars = [
            (budgets.index(_budget(e)) + (i - (len(present) - 1) / 2) * width, e)
            for e in entries
            if e["recipe"] == recipe
        ]
        drawn = axis.bar([x for x, _ in bars], [value(e) for _, e in bars], width, color=color)
        drawn.set_label(name)
        axis.bar_label(drawn, [f"batch {e['batch']}" for _, e in bars], fontsize=7)
    axis.set_xticks(range(len(budgets)), [f"{b:g} GiB" for b in budgets])
    axis.set_title(f"Equal memory, largest batch that fits: {label}")
    axis.grid(visible=True, axis="y", alpha=0.3)


def _largest_budget(entries: Any) -> list[Entry]:
    """Each batch once, in order: where several budgets hold it, of the largest."""
    best: dict[int, Entry] = {}
    for entry in sorted(entries, key=_budget):
        best[entry["batch"]] = entry
    return [best[batch] for batch in sorted(best)]


def _tokens_per_second(entry: Entry) -> float:
    return float(entry["output_tokens_per_s"])


def _milliseconds(entry: Entry) -> float:
    return float(entry["itl_ms"]["p50"])


def _budget(entry: Entry) -> float:
    return entry["gpu_memory_gb"] or 0.0


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    if not figure.get_constrained_layout():
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
