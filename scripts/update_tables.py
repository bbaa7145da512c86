"""Rewrite the tables in README.md and docs/ from benchmarks/results and from the code.

A table is between `<!-- table NAME -->` and `<!-- end -->`. NAME is a function below and the rest
of a result file's name, or one of code_tables.py, kernel_tables.py or serving_tables.py. `times`
takes the H200's results where there are any, else the H100's.
Run with --check to fail instead of writing where a table is out of date.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quatom.evaluation.ladders import LADDERS
from quatom.evaluation.standard_error import of_accuracy, of_average
from quatom.families.registry import FAMILIES
from quatom.presets import PRESETS
from quatom.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))  # also when a test runs this file by its path

from code_tables import CODE_TABLES
from kernel_tables import KERNEL_TABLES
from result_files import (
    GPUS,
    NOT_MEASURED,
    RESULTS,
    ROOT,
    exists,
    label,
    machine,
    machines,
    origin,
    rank,
    read,
    table,
)
from serving_tables import SERVING_TABLES

MARK = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
        entries.sort(key=lambda e: rank(e["recipe"]))
        rows = [
            [
                label(e["recipe"]),
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
        if any("same_top1" in e for e in entries):
            header += ["same token, %", "KL, nats"]
            for row, e in zip(rows, entries, strict=True):
                row += _beside_float(e)
        which = "all" if entries[0]["all_windows"] else "first"
        parts.append(
            f"{entries[0]['model']}, {corpus}, {which} {windows} windows of {length} tokens "
            f"({machines(data, entries)}, torch {environment['torch']}):\n\n"
            f"{table(header, rows)}"
        )
    return "\n".join(parts)


def backends(name: str) -> str:
    """Perplexity of the same checkpoints and windows through several backends and dtypes."""
    data = read(name.partition("-")[2])
    first = data["results"][0]

    def order(e: dict[str, Any]) -> tuple[Any, ...]:  # what others are compared with comes first
        dtype = e.get("dtype", "float32")
        return *rank(e["recipe"]), e["backend"] != "reference", dtype != "float32", dtype

    entries = sorted(data["results"], key=order)
    rows = []
    for e in entries:
        reference = next(r for r in entries if r["recipe"] == e["recipe"])
        change = e["perplexity"] / reference["perplexity"] - 1
        shown = "" if e is reference else f"{100 * change:+.2f} %"
        backend = f"{e['backend']}, {e['dtype']}" if "dtype" in e else e["backend"]
        rows.append([label(e["recipe"]), backend, f"{e['perplexity']:.3f}", shown])
    return (
        f"{first['model']}, {first['corpus']}, {first['windows']} windows of "
        f"{first['sequence_length']} tokens ({machine(data)}):\n\n"
    ) + table(["recipe", "backend", "perplexity", "from the reference"], rows)


def _of_atom(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The increase over float as a share of that of Atom's recipe of the same bits."""
    bits = re.search(r"w\da\dkv\d", entry["recipe"])
    twin = f"atom-{bits[0]}" if bits else None
    atom = next((e for e in entries if e["recipe"] == twin), None)
    if twin == entry["recipe"] or atom is None or not entry["float_perplexity"]:
        return ""
    increases = [e["perplexity"] - e["float_perplexity"] for e in (entry, atom)]
    return f"{increases[0] / increases[1]:.2f}"


def _increase(entry: dict[str, Any]) -> str:
    if entry["recipe"] == "fp16":
        return ""
    return f"+{entry['perplexity'] - entry['float_perplexity']:.2f}"


def _beside_float(entry: dict[str, Any]) -> list[str]:
    """Agreement with the float model and divergence from it, each with one standard error."""
    if "same_top1" not in entry:
        return ["", ""]
    shown = []
    for key, scale, digits in (("same_top1", 100, 1), ("kl_to_float", 1, 3)):
        error = entry[f"{key}_standard_error"]
        text = f"{scale * entry[key]:.{digits}f}"
        shown.append(text if error is None else f"{text} ± {scale * error:.{digits}f}")
    return shown


def zeroshot(name: str) -> str:
    """Accuracy of every recipe on every task: normalized by length where the task has that."""
    data = read(name)
    tasks = list(dict.fromkeys(e["task"] for e in data["results"]))
    values: dict[tuple[str, str], dict[str, Any]] = {}
    for e in sorted(data["results"], key=lambda e: e["metric"] == "acc_norm"):
        if e["metric"].startswith("acc"):
            values[e["recipe"], e["task"]] = e
    rows = []
    for recipe in sorted({e["recipe"] for e in data["results"]}, key=rank):
        own = [values[recipe, task] for task in tasks]
        errors = [of_accuracy(e) or 0.0 for e in own]
        means = [e["value"] for e in own]
        means.append(sum(means) / len(means))
        errors.append(of_average(errors))
        shown = [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in zip(means, errors, strict=True)]
        rows.append([label(recipe), *shown])
    first = data["results"][0]
    which = "all" if first["all_examples"] else f"first {first['examples']}"
    return (
        f"{first['model']}, percent right ± one standard error, {which} examples per task, "
        f"lm-evaluation-harness {first['harness']} ({machine(data)}):\n\n"
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


def times(name: str) -> str:
    """Time of quantizing by machine: each model and recipe on the first machine that has it."""
    shown: dict[tuple[str, str, bool], list[str]] = {}
    for where in (*GPUS, "cpu"):
        if not exists(f"quantize-{where}"):
            continue
        data = read(f"quantize-{where}")
        for e in data["results"]:
            key = e["model"], e["recipe"], where == "cpu"
            shown.setdefault(
                key,
                [
                    e["model"],
                    f"`{e['recipe']}`",
                    machines(data, [e]),
                    f"{e['samples']} x {e['sequence_length']}",
                    f"{e['seconds']:.0f}",
                    f"{e['peak_rss_gb']:.1f}",
                    f"{e['peak_gpu_gb']:.1f}" if e["peak_gpu_gb"] else "",
                ],
            )
    header = ["model", "recipe", "machine", "calibration", "seconds", "memory (GB)", "GPU (GB)"]
    rows = sorted(shown.items(), key=lambda item: (item[0][2], item[0][0], rank(item[0][1])))
    return table(header, [row for _, row in rows])


def search(name: str) -> str:
    """What searches under a budget expect of the recipes that they found."""
    data = read(name)
    rows = []
    for e in data["results"]:
        for recipe, bits, error in (
            ("base", "base_mean_bits", "base_divergence"),
            ("recipe", "mean_bits", "expected_divergence"),
        ):
            shown = [f"{e[bits]:.3f}", f"{e[error]:.3f}"]
            rows.append([e["model"], ", ".join(e["raised"]), label(e[recipe]), *shown])
    text = data["results"][0]
    header = ["model", "raised", "recipe", "bits, mean of those", "expected divergence"]
    return (
        f"Measured on {text['samples']} sequences of {text['sequence_length']} tokens "
        f"({machines(data, data['results'])}, torch {data['environment']['torch']}):\n\n"
    ) + table(header, rows)


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
        if recipe.tuning is None and PRESETS.get(recipe.name, recipe).tuning is not None:
            name += ", untuned"
        increase = e["perplexity"] - entries[0]["perplexity"]
        rows.append((formats, increase, [name, formats, f"{e['perplexity']:.2f}"]))
    order = list(dict.fromkeys(formats for formats, *_ in rows))
    rows.sort(key=lambda row: (order.index(row[0]), -row[1]))
    made = [[*row, f"+{increase:.2f}"] for _, increase, row in rows]
    made.insert(0, ["float", "16 / 16 / 16", f"{entries[0]['perplexity']:.2f}", ""])
    return table(["recipe", "weights / activations / KV", "perplexity", "increase"], made)


def agreement(name: str) -> str:
    """`quatom agree`: choices of tokens held against the reference's."""
    data = read(name)
    rows = [
        [
            label(e["recipe"]),
            f"{e['backend']}, {e['device']}, {e['dtype']}",
            f"{e['prompts']} x {e['tokens_each']}",
            f"{100 * e['share']:.2f} %",
            f"{e['mean_gap']:.2f}",
            f"{e['noise']:.2f}",
            f"{e['unexplained']}",
            "yes" if e["repeatable"] else "no",
        ]
        for e in sorted(data["results"], key=lambda e: rank(e["recipe"]))
    ]
    header = ["recipe", "what is compared", "prompts x tokens", "same choice"]
    header += ["mean gap where not", "noise", "beyond noise", "same twice"]
    return f"{data['results'][0]['model']}, {machine(data)}:\n\n" + table(header, rows)


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
    return f"On {machine(data)}:\n\n" + table([*header, "recipes", "packed, rms"], rows) + rest


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


def vllm(name: str) -> str:
    """Throughput of vLLM with the plugin and without, and of Quatom's engine.

    The engine's rows are those of serving-MACHINE.json where this file has none of its own.
    """
    data, keys = read(name), ("model", "recipe", "gpu_memory_gb", "workload", "requests")
    serving = f"serving-{name.partition('-')[2]}"
    entries = list(data["results"])
    if exists(serving) and all("engine" in entry for entry in entries):
        wanted = {tuple(entry[key] for key in keys) for entry in entries}
        entries += [e for e in read(serving)["results"] if tuple(e[key] for key in keys) in wanted]
    engines = {"vllm+quatom": "vLLM {} with the plugin", "vllm": "vLLM {}"}
    rows = [
        [
            engines.get(e.get("engine", ""), "Quatom's engine").format(e.get("vllm")),
            e["model"],
            "FP8, FP8 KV cache" if e["recipe"] == "fp8" else label(e["recipe"]),
            f"{e.get('tensor_parallel', 1)}",
            f"{e['gpu_memory_gb']:g}",
            f"{e['requests']} of {e['workload']}",
            f"{e['output_tokens_per_s']:.0f}",
        ]
        for e in sorted(entries, key=lambda e: (e["model"], e["output_tokens_per_s"]))
    ]
    header = ["engine", "shape", "format", "GPUs", "GiB", "requests", "output tokens/s"]
    return f"{origin(data, entries)}, random weights.\n\n{table(header, rows)}"


TABLES: dict[str, Callable[..., str]] = {
    "families": families,
    "supported": supported,
    "ablation": ablation,
    "accuracy": accuracy,
    "agreement": agreement,
    "backends": backends,
    "decode": decode,
    "engine": engine,
    "overhead": overhead,
    "quantize": quantize,
    "search": search,
    "zeroshot": zeroshot,
    "times": times,
    "vllm": vllm,
    **CODE_TABLES,
    **KERNEL_TABLES,
    **SERVING_TABLES,
}


def render(text: str) -> str:
    """The text with every table made anew from its result file."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        try:
            made = TABLES[name.split("-")[0]](name)
        except FileNotFoundError:
            if not name.endswith(f"-{GPUS[0]}"):
                raise
            made = NOT_MEASURED  # pages have places for that GPU's results before they are there
        return match.group(1) + "\n" + made + "\n" + match.group(3)

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
