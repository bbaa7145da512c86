"""Tables of serving results: serving-GPU.json and steps-GPU.json."""

from collections.abc import Callable
from typing import Any

from result_files import (
    NOT_MEASURED,
    machine,
    origin,
    picture_file,
    rank,
    read,
    table,
)


def engines(name: str) -> str:
    """Engines of vllm-GPU.json on one GPU within the same memory, for the README."""
    file = f"vllm-{name.partition('-')[2]}"
    data = read(file)
    runs = [e for e in data["results"] if e.get("tensor_parallel", 1) == 1]
    speeds = {(_what_runs(e), _shape(e)): e["output_tokens_per_s"] for e in runs}
    shapes = sorted({shape for _, shape in speeds}, reverse=True)
    first = next(_what_runs(e) for e in runs if e["recipe"] == "fp8")
    rows = []
    for what in sorted(
        {what for what, _ in speeds}, key=lambda what: (what != first, what[0] == "Q")
    ):
        cells = []
        for shape in shapes:
            speed, base = speeds.get((what, shape)), speeds.get((first, shape))
            over = f" ({speed / base:.2f}x)" if speed and base and what != first else ""
            cells.append("not measured" if speed is None else f"{speed:,.0f}{over}")
        rows.append([what, *cells])
    header = ["output tokens/s of", *shapes]
    return f"{origin(data, runs)}.\n\n" + table(header, rows)


def _what_runs(entry: dict[str, Any]) -> str:
    if entry["recipe"] == "fp8":
        return f"vLLM {entry['vllm']}, FP8 weights, activations and KV cache"
    if is_own(entry):
        return f"Quatom's engine, `{entry['recipe']}`"
    return f"vLLM {entry['vllm']} with Quatom's plugin, `{entry['recipe']}`"


def _shape(entry: dict[str, Any]) -> str:
    """A model's shape with its memory and load."""
    requests = f"{entry['requests']} requests of {entry['workload']} tokens"
    return f"{entry['model']}, {entry['gpu_memory_gb']:g} GiB, {requests}"


def picture(name: str) -> str:
    """The picture of `engines`, as `quatom bench plot` draws it."""
    file = f"vllm-{name.partition('-')[2]}"
    path = picture_file(f"{file}-engines")
    if not path.exists():
        command = f"quatom bench plot benchmarks/results/{file}.json"
        raise SystemExit(f"{path.name} is missing: run {command}")
    text = f"Output tokens per second of engines on one {machine(read(file))}, in the same memory"
    return f"![{text}](benchmarks/results/{path.name})\n"


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
    "engines": engines,
    "load": load,
    "picture": picture,
    "steps": steps,
    "throughput": throughput,
}
