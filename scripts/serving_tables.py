"""Tables of serving results: serving-GPU.json and steps-GPU.json, and the README's summary."""

from collections.abc import Callable
from typing import Any

from result_files import (
    GPUS,
    NOT_MEASURED,
    exists,
    label,
    machine,
    origin,
    picture_file,
    rank,
    read,
    table,
)

from quatom.presets import DEFAULT_RECIPE

SUMMARY = ("fp16", "atom-w4a4kv4", "quatom-w4a4kv4", "atom-w4a8kv4", "quatom-w4a8kv4")
SUMMARY_RUN = {
    "mode": "throughput",
    "model": "llama-2-7b",
    "gpu_memory_gb": 24.0,
    "workload": "1024+512",
}
SUMMARY_COMMAND = (
    "quatom bench throughput --random-weights llama-2-7b --gpu-memory 24 --recipe RECIPE"
)


def summary(name: str) -> str:
    """What a recipe costs in perplexity and brings in throughput, on one GPU.

    `summary` takes the first GPU of `GPUS` with a result file, `summary-GPU` that one.
    """
    accuracy = {
        e["recipe"]: e
        for e in read("accuracy-smollm2")["results"]
        if e["corpus"] == "wikitext2" and e["all_windows"]
    }
    data = read(f"serving-{name.partition('-')[2] or _first_gpu()}")
    runs = _summary_runs(data)
    if not runs:
        return NOT_MEASURED
    own = {e["recipe"]: e for e in runs if is_own(e)}
    rows = []
    for recipe in SUMMARY:
        e, run = accuracy[recipe], own.get(recipe)
        parts = ("weight", "activation", "kv")
        bits = " / ".join(
            "16" if recipe == "fp16" else f"{e[f'bits_per_{part}']:.1f}" for part in parts
        )
        speed = ["not measured", ""] if run is None else _speed(run, runs)
        rows.append([label(recipe), bits, f"{e['perplexity']:.2f}", *speed])
    others = [e for e in runs if not is_own(e)]
    rows += [[f"{engine(e)}, `{e['recipe']}`", "", "", *_speed(e, runs)] for e in others]
    header = ["recipe", "bits: weight / activation / KV", "perplexity, SmolLM2-135M"]
    header += ["output tokens/s, Llama-2-7B", "over FP16"]
    return (
        f"Throughput: {origin(data, runs)}. Llama-2-7B within 24 GiB, {SUMMARY_RUN['workload']} "
        f"tokens per request, `{SUMMARY_COMMAND}`.\n\n" + table(header, rows)
    )


def _speed(run: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    return [f"{run['output_tokens_per_s']:,.0f}", _over_float(run, runs)]


def picture(name: str) -> str:
    """The README's picture: the one of `bench plot` of the GPU that `summary` shows."""
    gpu = _first_gpu()
    path = picture_file(f"serving-{gpu}-llama-2-7b-batch")
    if not path.exists():
        command = f"quatom bench plot benchmarks/results/serving-{gpu}.json"
        raise SystemExit(f"{path.name} is missing: run {command}")
    where = machine(read(f"serving-{gpu}"))
    text = f"Throughput and latency by batch size on one {where}, at equal batch and equal memory"
    return f"![{text}](benchmarks/results/{path.name})\n"


def _first_gpu() -> str:
    """The first GPU of `GPUS` with the summary's runs of FP16 and of the default recipe."""
    return next(gpu for gpu in GPUS if _summary_recipes(gpu) >= {"fp16", DEFAULT_RECIPE})


def _summary_recipes(gpu: str) -> set[str]:
    if not exists(f"serving-{gpu}"):
        return set()
    return {e["recipe"] for e in _summary_runs(read(f"serving-{gpu}")) if is_own(e)}


def _summary_runs(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        e
        for e in data["results"]
        if all(e[key] == value for key, value in SUMMARY_RUN.items())
        and e.get("tensor_parallel", 1) == 1
    ]


def is_own(entry: dict[str, Any]) -> bool:
    """Whether Quatom's engine was measured, not another one beside it."""
    return entry.get("engine", "quatom") == "quatom"


def engine(entry: dict[str, Any]) -> str:
    """The engine of an entry with its version."""
    return f"{entry['engine']} {entry.get('engine_version', '')}".strip()


def throughput(name: str) -> str:
    """Whole runs of `bench throughput`, beside our own FP16 at the same memory."""
    return _serving_tables(name, ("throughput", "latency"), _run_row, _RUN_HEADER)


def batches(name: str) -> str:
    """Steady decoding at fixed batch sizes: equal batch and equal memory."""
    return _serving_tables(name, ("batch",), _batch_row, _BATCH_HEADER)


def load(name: str) -> str:
    """`bench serve`: closed loop and open loop over HTTP."""
    return _serving_tables(name, ("serve",), _load_row, _LOAD_HEADER)


def steps(name: str) -> str:
    """`bench steps`: where the time of a step goes, a column each."""
    data = read(name)
    entries = data["results"]
    entries.sort(key=lambda e: (e["model"], e["step_tokens"], e["workload"], rank(e["recipe"])))
    parts, limits = list(entries[0]["parts_ms"]), list(entries[0]["limit_ms"])
    recipes = {e["recipe"] for e in entries}
    columns = [f"{e['workload']}, {e['step_tokens']} tokens" for e in entries]
    if len({e["model"] for e in entries}) > 1:
        columns = [f"{e['model']}, {c}" for c, e in zip(columns, entries, strict=True)]
    if len(recipes) > 1:
        columns = [f"{c}, `{e['recipe']}`" for c, e in zip(columns, entries, strict=True)]
    header = ["milliseconds of", *columns]
    rows = [[part, *(f"{e['parts_ms'][part]:.2f}" for e in entries)] for part in parts]
    rows.append(["the step", *(f"{e['milliseconds']:.2f}" for e in entries)])
    rows += [
        [f"limit: {part}", *(f"{e['limit_ms'][part]:.2f}" for e in entries)] for part in limits
    ]
    models = ", ".join(sorted({e["model"] for e in entries}))
    which = f", `{entries[0]['recipe']}`" if len(recipes) == 1 else ""
    return f"{origin(data, entries)}; {models}{which}:\n\n" + table(header, rows)


_RUN_HEADER = [
    "requests x tokens, memory, recipe",
    "output tokens/s",
    "over FP16",
    "running, mean / most",
    "KV tokens",
    "TTFT p50 (ms)",
    "TPOT p50 (ms)",
    "end to end p50 (s)",
    "share of the limit",
]
_BATCH_HEADER = [
    "memory, recipe",
    "batch",
    "tokens/s",
    "over FP16",
    "ms per token",
    "share of the limit",
]
_LOAD_HEADER = [
    "load, recipe",
    "output tokens/s",
    "TTFT p50 / p99 (ms)",
    "TPOT p50 / p99 (ms)",
    "ITL p99 (ms)",
    "end to end p50 (s)",
    "errors",
    "client processes",
]


def _serving_tables(
    name: str,
    modes: tuple[str, ...],
    make_row: Callable[[dict[str, Any], list[dict[str, Any]]], list[str]],
    header: list[str],
) -> str:
    """A table for each model and comparison in serving-MACHINE.json."""
    file = f"serving-{name.partition('-')[2]}"
    data = read(file)
    entries = [e for e in data["results"] if e["mode"] in modes]
    if not entries:
        return NOT_MEASURED
    parts = [f"{origin(data, entries)}; random weights, so these models have no accuracy here:\n"]
    for model, comparison in sorted({(e["model"], e["comparison"] or "") for e in entries}):
        rows = [e for e in entries if (e["model"], e["comparison"] or "") == (model, comparison)]
        rows.sort(key=_serving_order)
        title = f"{model}, {comparison}" if comparison else model
        parts.append(f"{title}:\n\n{table(header, [make_row(e, rows) for e in rows])}")
    return "\n".join(parts)


def _serving_order(entry: dict[str, Any]) -> tuple[Any, ...]:
    """By what is compared first, the recipes of one comparison next to each other."""
    batch = 0 if entry["comparison"] == "equal memory" else entry["batch"] or 0
    return (
        entry["mode"],
        entry["workload"],
        entry["gpu_memory_gb"] or 0,
        entry["concurrency"] or 0,
        entry["request_rate"] or 0,
        batch,
        *rank(entry["recipe"]),
    )


def _over_float(entry: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Throughput over that of Quatom's FP16 in the same conditions, for any number of requests."""
    same = [
        e
        for e in rows
        if e["recipe"] == "fp16"
        and is_own(e)
        and _serving_order(e)[:-2] == _serving_order(entry)[:-2]
    ]
    if not same:
        return ""
    return f"{entry['output_tokens_per_s'] / same[0]['output_tokens_per_s']:.2f}x"


def _memory_and_recipe(entry: dict[str, Any]) -> str:
    memory = entry["gpu_memory_gb"]
    parts = [] if memory is None else [f"{memory:g} GiB"]
    parts += [] if is_own(entry) else [engine(entry)]
    return ", ".join([*parts, f"`{entry['recipe']}`"])


def _share(entry: dict[str, Any]) -> str:
    share = entry["share_of_limit"]
    return "" if share is None else f"{100 * share:.0f} %"


def _run_row(entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    tpot = entry["tpot_ms"]
    return [
        f"{entry['requests']} x {entry['workload']}, {_memory_and_recipe(entry)}",
        f"{entry['output_tokens_per_s']:.0f}",
        _over_float(entry, rows),
        ""
        if entry["mean_running"] is None
        else f"{entry['mean_running']:.0f} / {entry['max_running']}",
        f"{entry['kv_tokens']:,}",
        f"{entry['ttft_ms']['p50']:.0f}",
        "" if tpot is None else f"{tpot['p50']:.1f}",
        f"{entry['e2e_ms']['p50'] / 1e3:.2f}",
        _share(entry),
    ]


def _batch_row(entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    return [
        _memory_and_recipe(entry),
        f"{entry['batch']}",
        f"{entry['output_tokens_per_s']:.0f}",
        _over_float(entry, rows),
        f"{entry['itl_ms']['p50']:.2f}",
        _share(entry),
    ]


def _load_row(entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    users, rate = entry["concurrency"], entry["request_rate"]
    offered = f"{users} concurrent" if rate is None else f"{rate:g} requests/s"
    ttft, tpot, itl = entry["ttft_ms"], entry["tpot_ms"], entry["itl_ms"]
    return [
        f"{offered}, {entry['workload']}, {_memory_and_recipe(entry)}",
        f"{entry['output_tokens_per_s']:.0f}",
        f"{ttft['p50']:.0f} / {ttft['p99']:.0f}",
        "" if tpot is None else f"{tpot['p50']:.1f} / {tpot['p99']:.1f}",
        "" if itl is None else f"{itl['p99']:.1f}",
        f"{entry['e2e_ms']['p50'] / 1e3:.2f}",
        f"{entry['errors']}",
        f"{entry.get('client_processes', 1)}",
    ]


SERVING_TABLES = {
    "batches": batches,
    "load": load,
    "picture": picture,
    "steps": steps,
    "summary": summary,
    "throughput": throughput,
}
