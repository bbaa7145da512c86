"""Rewrite the tables in README.md and docs/ from benchmarks/results and from the code.

A table is between `<!-- table NAME -->` and `<!-- end -->`. NAME is a function below and the rest
of a result file's name, or a function of code_tables.py. `<!-- table NAME brief -->` asks for fewer
rows.
Run with --check to fail instead of writing where a table is out of date.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quatom.evaluation.ladders import LADDERS
from quatom.evaluation.standard_error import of_accuracy, of_average
from quatom.families.registry import FAMILIES
from quatom.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # also when a test runs this file by its path

from code_tables import CODE_TABLES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table ([\w.-]+)( brief)? -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPE_ORDER = (
    "fp16",
    "w8a8",
    "smoothquant-w8a8",
    "w4a16",
    "gptq-w4a16",
    "awq-w4a16",
    "quip-w4a16",
    "rtn-w4a4",
    "smoothquant-w4a4",
    "atom-w4a4kv4",
    "quatom-w4a4kv4",
    "atom-w4a8kv4",
    "quatom-w4a8kv4",
    "atom-fp4",
    "atom-w3a3",
)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first align to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    """A result file by its name without .json."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _machine(data: dict[str, Any]) -> str:
    """The GPU of a result file, or its CPU where it has none."""
    environment = data["environment"]
    return str(environment.get("gpu", environment["cpu"]))


def _machines(data: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The machines that some entries of a file were measured on."""
    return ", ".join(dict.fromkeys(e.get("machine", _machine(data)) for e in entries))


def _label(recipe: str) -> str:
    return "float" if recipe == "fp16" else f"`{recipe}`"


def accuracy(name: str) -> str:
    """Perplexity and bits of every recipe in an accuracy file, a table for each set of windows."""
    data = read(name)
    environment = data["environment"]
    parts = []
    settings = sorted(
        {(e["corpus"], e["windows"], e["sequence_length"]) for e in data["results"]}, reverse=True
    )
    for corpus, windows, length in settings:
        entries = [
            e
            for e in data["results"]
            if (e["corpus"], e["windows"], e["sequence_length"]) == (corpus, windows, length)
        ]
        entries.sort(key=lambda e: _rank(e["recipe"]))
        rows = [
            [
                _label(e["recipe"]),
                f"{e['perplexity']:.2f}",
                "" if not e["float_perplexity"] else _increase(e),
                _of_atom(e, entries),
                "" if e["recipe"] == "fp16" else f"{e['bits_per_weight']:.2f}",
                "" if e["recipe"] == "fp16" else f"{e['bits_per_activation']:.2f}",
                "" if e["recipe"] == "fp16" else f"{e['bits_per_kv']:.2f}",
            ]
            for e in entries
        ]
        header = ["recipe", "perplexity", "increase", "increase / Atom's increase"]
        header += ["bits/weight", "bits/activation", "bits/KV"]
        which = "all" if entries[0]["all_windows"] else "first"
        parts.append(
            f"{entries[0]['model']}, {corpus}, {which} {windows} windows of {length} tokens "
            f"({_machines(data, entries)}, torch {environment['torch']}):\n\n"
            f"{table(header, rows)}"
        )
    return "\n".join(parts)


SUMMARY = ("fp16", "atom-w4a4kv4", "quatom-w4a4kv4", "atom-w4a8kv4", "quatom-w4a8kv4")
SUMMARY_RUN = {"mode": "throughput", "model": "llama-2-7b", "gpu_memory_gb": 24.0}


def summary(name: str) -> str:
    """The README's table: what a recipe costs in perplexity and brings in throughput."""
    accuracy = {
        e["recipe"]: e
        for e in read("accuracy-smollm2")["results"]
        if e["corpus"] == "wikitext2" and e["all_windows"]
    }
    data = read(f"serving-{name.partition('-')[2]}")
    runs = {
        e["recipe"]: e
        for e in data["results"]
        if all(e[key] == value for key, value in SUMMARY_RUN.items())
    }
    rows = []
    for recipe in SUMMARY:
        e, run = accuracy[recipe], runs.get(recipe)
        parts = ("weight", "activation", "kv")
        bits = " / ".join(
            "16" if recipe == "fp16" else f"{e[f'bits_per_{part}']:.1f}" for part in parts
        )
        speed = ["not measured", ""]
        if run is not None:
            speed = [f"{run['output_tokens_per_s']:,.0f}", _over_float(run, list(runs.values()))]
        rows.append([_label(recipe), bits, f"{e['perplexity']:.2f}", *speed])
    header = ["recipe", "bits: weight / activation / KV", "perplexity, SmolLM2-135M"]
    header += ["output tokens/s, Llama-2-7B", "over FP16"]
    workload = next(iter(runs.values()))["workload"]
    return (
        f"{_machine(data)}; Llama-2-7B within 24 GiB, {workload} tokens per request:\n\n"
        + table(header, rows)
    )


def backends(name: str) -> str:
    """Perplexity of the same checkpoints and windows through several backends and dtypes."""
    data = read(name.partition("-")[2])
    first = data["results"][0]

    def order(e: dict[str, Any]) -> tuple[Any, ...]:  # what others are compared with comes first
        dtype = e.get("dtype", "float32")
        return *_rank(e["recipe"]), e["backend"] != "reference", dtype != "float32", dtype

    entries = sorted(data["results"], key=order)
    rows = []
    for e in entries:
        reference = next(r for r in entries if r["recipe"] == e["recipe"])
        change = e["perplexity"] / reference["perplexity"] - 1
        shown = "" if e is reference else f"{100 * change:+.2f} %"
        backend = f"{e['backend']}, {e['dtype']}" if "dtype" in e else e["backend"]
        rows.append([_label(e["recipe"]), backend, f"{e['perplexity']:.3f}", shown])
    return (
        f"{first['model']}, {first['corpus']}, {first['windows']} windows of "
        f"{first['sequence_length']} tokens ({_machine(data)}):\n\n"
    ) + table(["recipe", "backend", "perplexity", "from the reference"], rows)


def _of_atom(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The increase over float as a share of that of Atom's recipe of the same bits."""
    twin = entry["recipe"].replace("quatom-", "atom-")
    atom = next((e for e in entries if e["recipe"] == twin), None)
    if twin == entry["recipe"] or atom is None or not entry["float_perplexity"]:
        return ""
    increases = [e["perplexity"] - e["float_perplexity"] for e in (entry, atom)]
    return f"{increases[0] / increases[1]:.2f}"


def _rank(recipe: str) -> tuple[int, str]:
    known = RECIPE_ORDER.index(recipe) if recipe in RECIPE_ORDER else len(RECIPE_ORDER)
    return known, recipe


def _increase(entry: dict[str, Any]) -> str:
    if entry["recipe"] == "fp16":
        return ""
    return f"+{entry['perplexity'] - entry['float_perplexity']:.2f}"


def zeroshot(name: str) -> str:
    """Accuracy of every recipe on every task: normalized by length where the task has that."""
    data = read(name)
    tasks = list(dict.fromkeys(e["task"] for e in data["results"]))
    values: dict[tuple[str, str], dict[str, Any]] = {}
    for e in sorted(data["results"], key=lambda e: e["metric"] == "acc_norm"):
        if e["metric"].startswith("acc"):
            values[e["recipe"], e["task"]] = e
    rows = []
    for recipe in sorted({e["recipe"] for e in data["results"]}, key=_rank):
        own = [values[recipe, task] for task in tasks]
        errors = [of_accuracy(e) or 0.0 for e in own]
        means = [e["value"] for e in own]
        means.append(sum(means) / len(means))
        errors.append(of_average(errors))
        shown = [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in zip(means, errors, strict=True)]
        rows.append([_label(recipe), *shown])
    first = data["results"][0]
    which = "all" if first["all_examples"] else f"first {first['examples']}"
    return (
        f"{first['model']}, percent right ± one standard error, {which} examples per task, "
        f"lm-evaluation-harness {first['harness']} ({_machine(data)}):\n\n"
    ) + table(["recipe", *tasks, "mean"], rows)


def quantize(name: str) -> str:
    """Time and memory of quantizing."""
    rows = [
        [
            e["model"],
            f"`{e['recipe']}`",
            f"{e['samples']} x {e['sequence_length']}",
            f"{e['seconds']:.0f}",
            f"{e['peak_rss_gb']:.2f}",
            f"{e['peak_gpu_gb']:.2f}" if e["peak_gpu_gb"] else "",
            f"{e['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for e in read(name)["results"]
    ]
    header = ["model", "recipe", "calibration", "seconds", "peak RSS (GB)", "GPU (GB)", "size (MB)"]
    return table(header, rows)


def engine(name: str) -> str:
    """The engine's own time per step."""
    rows = [
        [
            f"{e['sampling']}, {e['sequences']} sequences",
            f"{e['ms_per_step']:.2f}",
            f"{e['p10']:.2f}",
            f"{e['p90']:.2f}",
            f"{e['cpu_ms_per_step']:.2f}",
        ]
        for e in read(name)["results"]
    ]
    return table(["sampling", "ms per step", "p10", "p90", "CPU ms (median)"], rows)


def overhead(name: str) -> str:
    """CPU time of a served token without the model, by process."""
    rows = [
        [
            f"in a {e['engine']}{' of its own' * (e['engine'] == 'process')}",
            f"{e['server_us_per_token']:.0f}",
            "" if e["engine_us_per_token"] is None else f"{e['engine_us_per_token']:.0f}",
            f"{e['output_tokens_per_s']:.0f}",
        ]
        for e in read(name)["results"]
    ]
    header = ["engine", "us per token, server", "us per token, engine's process", "tokens/s"]
    return table(header, rows)


def decode(name: str) -> str:
    """Our engine against transformers on a CPU."""
    rows = [
        [
            f"`{e['recipe']}`, batch {e['batch']}",
            f"{e['tokens_per_s']:.2f}",
            f"{e['transformers_tokens_per_s']:.2f}",
            f"{e['ratio']:.2f}",
        ]
        for e in read(name)["results"]
    ]
    return table(["SmolLM2-135M", "tokens/s", "transformers float32, tokens/s", "ratio"], rows)


def ablation(name: str) -> str:
    """Rungs of every ladder in an ablation file, each beside what it adds."""
    data = read(name)
    entries = data["results"]
    parts = []
    for ladder in dict.fromkeys(e["ladder"] for e in entries if e["rung"] != "float"):
        floats = [e for e in entries if e["rung"] == "float"]
        own = [e for e in entries if e["ladder"] == ladder and e not in floats]
        own.sort(key=lambda e: list(LADDERS[ladder]).index(e["rung"]))
        rungs = floats[:1] + own
        first = rungs[-1]
        shown = _methods(rungs) if ladder == "prior-work" else _rungs(rungs)
        parts.append(
            f"{first['model']}, {first['corpus']}, {first['windows']} windows of "
            f"{first['sequence_length']} tokens, calibrated on {first['calibration']}, ladder "
            f"`{ladder}`:\n\n{shown}"
        )
    return "\n".join(parts)


def _rungs(entries: list[dict[str, Any]]) -> str:
    rows = [[e["rung"].replace("_", " "), f"{e['perplexity']:.2f}"] for e in entries]
    return table(["rung", "perplexity"], rows)


def _methods(entries: list[dict[str, Any]]) -> str:
    """Recipes beside each other, those of equal formats together."""
    rows = []
    for e in entries[1:]:
        recipe = Recipe.from_dict(e["settings"])
        parts = (recipe.weights.format, recipe.activations.format, recipe.kv_cache.format)
        formats = " / ".join(part.replace("float16", "16") for part in parts)
        name, scaling = f"`{recipe.name}`", recipe.channel_scaling
        if scaling is not None and scaling.method == "smoothquant":
            name += f", strength {scaling.strength:g}"
        increase = e["perplexity"] - entries[0]["perplexity"]
        rows.append((formats, increase, [name, formats, f"{e['perplexity']:.2f}"]))
    order = list(dict.fromkeys(formats for formats, *_ in rows))
    rows.sort(key=lambda row: (order.index(row[0]), -row[1]))
    made = [[*row, f"+{increase:.2f}"] for _, increase, row in rows]
    made.insert(0, ["float", "16 / 16 / 16", f"{entries[0]['perplexity']:.2f}", ""])
    return table(["recipe", "weights / activations / KV", "perplexity", "increase"], made)


BRIEF_ATTENTION = {(32, 1024, 64), (8, 4096, 64), (8, 32768, 1)}
"""KV heads, length and batch of the rows of a brief table."""


def attention(name: str, *, brief: bool = False) -> str:
    """Decode attention over the INT4 cache, the fastest backend, beside cuDNN in BF16."""
    data = read(name)
    environment = data["environment"]
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for e in data["results"]:
        shape = (e["num_heads"], e["num_kv_heads"], e["head_dim"], e["length"], e["batch"])
        wanted = e["op"] == "decode" and e["kv"] == "int4" and e["new_tokens"] == 1
        if not wanted or e["head_dim"] != 128 or e["ratio_cudnn_bf16"] is None:
            continue
        if brief and (e["num_kv_heads"], e["length"], e["batch"]) not in BRIEF_ATTENTION:
            continue
        if brief and e["num_heads"] != 32:
            continue
        if shape not in best or e["microseconds"] < best[shape]["microseconds"]:
            best[shape] = e
    rows = [
        [
            f"{e['batch']} x {e['length']}, {e['num_heads']}/{e['num_kv_heads']} heads",
            f"{e['microseconds']:.1f}",
            f"{100 * e['share_of_copy']:.0f} %",
            f"{e['ratio_cudnn_bf16']:.2f}x",
            f"{e['ratio_flash_bf16']:.2f}x",
        ]
        for _, e in sorted(best.items(), reverse=True)
    ]
    header = [
        "batch x length",
        "us",
        "share of copy bandwidth",
        "cuDNN BF16",
        "FlashAttention BF16",
    ]
    return (
        f"{environment['gpu']}, copy {environment['copy_tb_s']} TB/s, torch "
        f"{environment['torch']}; ratios: time of the other over ours, in one run:\n\n"
        + table(header, rows)
    )


def kernels(name: str, *, brief: bool = False) -> str:
    """W4A4 and W4A8 on Hopper beside cuBLAS BF16 and the best public kernel for the job."""
    data = read(name)
    environment = data["environment"]
    shown = (1, 16, 64, 256, 1024, 4096)
    shapes = {(22016, 4096), (4096, 11008)} if brief else None
    own = {
        (e["n"], e["k"], e["m"], e["scheme"]): e
        for e in data["results"]
        if e["op"] == "linear" and e["backend"] == "cuda"
    }
    problems = {key[:3] for key in own if key[3] == "w4a4" and key[2] in shown}
    rows = []
    for n, k, m in sorted(problems, key=lambda p: (-p[0] * p[1], p[0], p[2])):
        if shapes is not None and (n, k) not in shapes:
            continue
        row = [f"{n} x {k}, M = {m}"]
        for scheme in ("w4a4", "w4a8"):
            e = own[n, k, m, scheme]
            row += [f"{e['microseconds']:.1f}", f"{100 * e['share_of_copy']:.0f} %"]
            row += [f"{e['tops']:.0f}", f"{e['ratio_bf16']:.2f}x"]
            row += ["" if e["ratio_humming"] is None else f"{e['ratio_humming']:.2f}x"]
        rows.append(row)
    header = ["N x K, tokens"]
    for scheme in ("W4A4", "W4A8"):
        header += [f"{scheme}: us", "share of copy", "TOPS", "BF16", "humming"]
    return (
        f"{environment['gpu']}, copy {environment['copy_tb_s']} TB/s, torch "
        f"{environment['torch']}; INT8 outliers and all scales included, W4A8 with INT8 and one "
        "scale per token; ratios: time of cuBLAS BF16 and of humming's A8 over ours, in one "
        "run:\n\n" + table(header, rows)
    )


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
    entries.sort(key=lambda e: (e["model"], e["step_tokens"], e["workload"], _rank(e["recipe"])))
    parts, limits = list(entries[0]["parts_ms"]), list(entries[0]["limit_ms"])
    recipes = {e["recipe"] for e in entries}
    columns = [f"{e['workload']}, {e['step_tokens']} tokens" for e in entries]
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
    return f"{data['environment']['gpu']}, {models}{which}:\n\n" + table(header, rows)


def agreement(name: str) -> str:
    """`quatom agree`: choices of tokens held against the reference's."""
    data = read(name)
    rows = [
        [
            _label(e["recipe"]),
            f"{e['backend']}, {e['device']}, {e['dtype']}",
            f"{e['prompts']} x {e['tokens_each']}",
            f"{100 * e['share']:.2f} %",
            f"{e['mean_gap']:.2f}",
            f"{e['noise']:.2f}",
            f"{e['unexplained']}",
            "yes" if e["repeatable"] else "no",
        ]
        for e in sorted(data["results"], key=lambda e: _rank(e["recipe"]))
    ]
    header = ["recipe", "what is compared", "prompts x tokens", "same choice"]
    header += ["mean gap where not", "noise", "beyond noise", "same twice"]
    return f"{data['results'][0]['model']}, {_machine(data)}:\n\n" + table(header, rows)


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


def fused(name: str) -> str:
    """The kernels around the linear layers, and what reordering brings over gathering outliers."""
    data = read(f"kernels-{name.partition('-')[2]}")
    rows = [
        [
            f"{e['op'].replace('_', ' ')}, {e['scheme']}",
            f"{e['k']}",
            f"{e['m']}",
            f"{e['microseconds']:.1f}",
            f"{100 * e['share_of_copy']:.0f} %" if e["op"].endswith("_quantize") else "",
        ]
        for e in data["results"]
        if e["op"] != "linear" and e["backend"] == "cuda" and e["m"] in (1, 16, 64, 256, 4096)
    ]
    return f"{_machine(data)}:\n\n" + table(["operation", "K", "M", "us", "share of copy"], rows)


def families(name: str) -> str:
    """What `scripts/verify_families.py` found of every family on one machine."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet.\n"
    data = read(name)
    rows, missing = [], []
    for family in FAMILIES:
        entries = [e for e in data["results"] if e["family"] == family.name]
        if not entries:
            missing.append(f"`{family.name}`")
            continue
        floats = [e for e in entries if e["recipe"] == "fp16"]
        packed = [e for e in entries if e["recipe"] != "fp16" and "refused" not in e]
        rows.append(
            [
                f"`{family.name}`",
                ", ".join(sorted({e["model"] for e in floats})),
                *(_worst([e for e in floats if e["dtype"] == d]) for d in _dtypes(data)),
                ", ".join(sorted({f"`{e['recipe']}`" for e in packed})),
                _worst(packed, "rms"),
            ]
        )
    header = ["family", "tiny models"]
    header += [f"{dtype} to transformers, largest" for dtype in _dtypes(data)]
    rest = f"\nNot measured there: {', '.join(missing)}.\n" if missing else ""
    return f"On {_machine(data)}:\n\n" + table([*header, "recipes", "packed, rms"], rows) + rest


def supported(name: str) -> str:
    """Families and architectures, from the registry; `name` is not used."""
    rows = [
        [f"`{family.name}`", ", ".join(f"`{a}`" for a in family.architectures), family.models]
        for family in FAMILIES
    ]
    return table(["family", "architectures", "released models"], rows)


def _dtypes(data: dict[str, Any]) -> list[str]:
    """Dtypes of the floating-point models of a families file."""
    return list(dict.fromkeys(e["dtype"] for e in data["results"] if e["recipe"] == "fp16"))


def _worst(entries: list[dict[str, Any]], measure: str = "largest") -> str:
    """The largest distance of several results, prompts and decodes alike."""
    found = [entry[part][measure] for entry in entries for part in ("prompt", "decode")]
    return f"{max(found):.1e}" if found else "-"


def _serving_tables(
    name: str,
    modes: tuple[str, ...],
    make_row: Callable[[dict[str, Any], list[dict[str, Any]]], list[str]],
    header: list[str],
) -> str:
    """A table for each model and comparison in serving-MACHINE.json."""
    file = f"serving-{name.partition('-')[2]}"
    data = read(file) if (RESULTS / f"{file}.json").exists() else {"results": []}
    entries = [e for e in data["results"] if e["mode"] in modes]
    if not entries:
        return "Not measured yet.\n"
    environment = data["environment"]
    parts = [f"{environment.get('gpu') or environment['cpu']}, torch {environment['torch']}:\n"]
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
        *_rank(entry["recipe"]),
    )


def _over_float(entry: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Throughput over that of FP16 under the same conditions, whatever its number of requests."""
    same = [
        e
        for e in rows
        if e["recipe"] == "fp16" and _serving_order(e)[:-2] == _serving_order(entry)[:-2]
    ]
    if not same:
        return ""
    return f"{entry['output_tokens_per_s'] / same[0]['output_tokens_per_s']:.2f}x"


def _memory_and_recipe(entry: dict[str, Any]) -> str:
    memory = entry["gpu_memory_gb"]
    return f"`{entry['recipe']}`" if memory is None else f"{memory:g} GiB, `{entry['recipe']}`"


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


TABLES: dict[str, Callable[..., str]] = {
    "families": families,
    "supported": supported,
    "ablation": ablation,
    "accuracy": accuracy,
    "agreement": agreement,
    "attention": attention,
    "backends": backends,
    "batches": batches,
    "decode": decode,
    "fused": fused,
    "engine": engine,
    "kernels": kernels,
    "load": load,
    "overhead": overhead,
    "quantize": quantize,
    "steps": steps,
    "summary": summary,
    "throughput": throughput,
    "zeroshot": zeroshot,
    **CODE_TABLES,
}


def render(text: str) -> str:
    """The text with every table made anew from its result file."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        options = {"brief": True} if match.group(3) else {}
        made = TABLES[name.split("-")[0]](name, **options)
        return match.group(1) + "\n" + made + "\n" + match.group(4)

    return MARK.sub(replace, text)


def main() -> int:
    """Update all files, or with --check report the ones that are out of date."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = render(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: tables {'are out of date' if '--check' in sys.argv else 'updated'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
