"""Tables of perplexities and tasks; functions as in update_tables.py."""

import re
from collections.abc import Callable
from typing import Any

from result_files import exists, label, machine, machines, rank, read, table

from quatom.evaluation.standard_error import of_accuracy, of_average

_METRICS = (
    *("perplexity", "exact_match,strict-match", "exact_match,flexible-extract", "acc", "acc_norm"),
)
"""Metrics of tasks; a later one is shown where a task has several."""
_LABELS = {"gsm8k": "gsm8k, flexible match"}

SUMMARY = (
    *("fp16", "atom-w4a4kv4", "quatom-w4a4kv4", "quatom-w4a4kv4-tuned"),
    *("atom-w4a8kv4", "quatom-w4a8kv4", "quatom-w4a8kv4-tuned"),
)
SUMMARY_MODELS = {
    "smollm2": "SmolLM2-135M",
    "gemma-3-270m": "Gemma 3 270M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
}


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


def summary(_name: str) -> str:
    """What recipes cost in perplexity of WikiText-2 on each model, for the README."""
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for name, title in SUMMARY_MODELS.items():
        if exists(f"accuracy-{name}"):
            entries = read(f"accuracy-{name}")["results"]
            columns[title] = {e["recipe"]: e for e in entries if e["corpus"] == "wikitext2"}
    rows = []
    for recipe in SUMMARY:
        own = [found.get(recipe) for found in columns.values()]
        if (first := next((e for e in own if e), None)) is None:
            continue
        bits = " / ".join(
            "16" if recipe == "fp16" else f"{first[f'bits_per_{part}']:.1f}"
            for part in ("weight", "activation", "kv")
        )
        rows.append(
            [label(recipe), bits, *("" if e is None else f"{e['perplexity']:.2f}" for e in own)]
        )
    return table(["recipe", "bits: weight / activation / KV", *columns], rows)


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
    """The increase over float; its standard error is that of the paired losses of the windows."""
    if entry["recipe"] == "fp16":
        return ""
    shown = f"+{entry['perplexity'] - entry['float_perplexity']:.2f}"
    error = entry.get("loss_increase_standard_error")
    return shown if error is None else f"{shown} ± {entry['perplexity'] * error:.2f}"


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
    """Accuracy of every recipe on every task, by the last of its metrics in `_METRICS`."""
    data = read(name)
    tasks = list(dict.fromkeys(e["task"] for e in data["results"]))
    values: dict[tuple[str, str], dict[str, Any]] = {}
    for e in sorted(data["results"], key=lambda e: _METRICS.index(e["metric"])):
        values[e["recipe"], e["task"]] = e
    rows = []
    for recipe in sorted({e["recipe"] for e in data["results"]}, key=rank):
        own = [values[recipe, task] for task in tasks if (recipe, task) in values]
        if len(own) < len(tasks):
            continue  # of a run that is not whole: a mean of other tasks would mislead
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
    ) + table(["recipe", *(_LABELS.get(task, task) for task in tasks), "mean"], rows)


ACCURACY_TABLES: dict[str, Callable[[str], str]] = {
    "accuracy": accuracy,
    "summary": summary,
    "zeroshot": zeroshot,
}
