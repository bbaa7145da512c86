"""Tables of perplexities, tasks and ladders; functions as in update_tables.py."""

import re
from collections.abc import Callable
from typing import Any

from result_files import label, machine, machines, matching, rank, read, table

from quatom.evaluation.ladders import LADDERS, formats_of
from quatom.evaluation.standard_error import of_accuracy, of_average
from quatom.presets import PRESETS
from quatom.recipe import Recipe

_METRICS = (
    *("perplexity", "exact_match,strict-match", "exact_match,flexible-extract", "acc", "acc_norm"),
)
"""Metrics of tasks; a later one is shown where a task has several."""
_LABELS = {"gsm8k": "gsm8k, flexible match"}

PUBLISHED = {
    "Llama 7B": {
        "float": 5.68,
        "gptq_w4a16": 5.85,
        "awq_w4a16": 5.81,
        "smoothquant_w4a4": 22.62,
        "omniquant_w4a4kv4": 11.59,
        "qllm_w4a4kv4": 9.65,
        "atom_w4a4kv4": 6.16,
    },
    "Llama 2 7B": {
        "float": 5.47,
        "gptq_w4a16": 5.61,
        "awq_w4a16": 5.62,
        "smoothquant_w4a4": 83.12,
        "omniquant_w4a4kv4": 14.61,
        "qllm_w4a4kv4": 11.75,
        "atom_w4a4kv4": 6.03,
    },
}
"""WikiText-2 perplexities by model and rung; docs/lab/prior-work.md names the papers."""


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
        name, formats = _method(recipe), formats_of(recipe)
        increase = e["perplexity"] - entries[0]["perplexity"]
        rows.append((formats, increase, [name, formats, f"{e['perplexity']:.2f}"]))
    order = list(dict.fromkeys(formats for formats, *_ in rows))
    rows.sort(key=lambda row: (order.index(row[0]), -row[1]))
    made = [[*row, f"+{increase:.2f}"] for _, increase, row in rows]
    made.insert(0, ["float", "16 / 16 / 16", f"{entries[0]['perplexity']:.2f}", ""])
    return table(["recipe", "weights / activations / KV", "perplexity", "increase"], made)


def _method(recipe: Recipe) -> str:
    """A recipe as tables of methods name it."""
    name, scaling = f"`{recipe.name}`", recipe.channel_scaling
    if scaling is not None and recipe.name.startswith("smoothquant"):
        name += f", strength {scaling.strength:g}"
    if recipe.tuning is None and PRESETS.get(recipe.name, recipe).tuning is not None:
        name += ", untuned"
    return name


def methods(name: str) -> str:
    """Method x bits x model: rungs of `prior-work` on every model measured, and as published."""
    machine_name = name.partition("-")[2]
    columns: dict[str, dict[str, float]] = {}
    settings = []
    for file in matching(f"ablation-*-{machine_name}"):
        entries = read(file)["results"]
        own = [e for e in entries if e["rung"] == "float" or e.get("ladder") == "prior-work"]
        if any(e["rung"] != "float" for e in own):
            columns[own[0]["model"]] = {e["rung"]: e["perplexity"] for e in own}
            e = own[-1]
            settings.append(
                f"{e['model']} on {e['windows']} windows of {e['sequence_length']} tokens, "
                f"calibrated on {e['calibration']}"
            )
    if not columns:
        raise FileNotFoundError(name)
    measured = list(columns)
    columns |= PUBLISHED
    rows = []
    for rung, recipe in {"float": None, **LADDERS["prior-work"]}.items():
        # A preset as it is: strengths of smoothing are in the table of their model.
        if recipe is not None and rung.replace("_", "-") not in (*PRESETS, "qllm-untuned"):
            continue
        cells = [_over_float(values, rung) for values in columns.values()]
        if any(cells):
            what = ["float", "16 / 16 / 16"]
            if recipe is not None:
                what = [_method(recipe), formats_of(recipe)]
            rows.append([*what, *cells])
    order = list(dict.fromkeys(row[1] for row in rows))
    rows.sort(key=lambda row: order.index(row[1]))
    header = ["recipe", "weights / activations / KV"]
    header += [f"{m}, measured" if m in measured else f"{m}, published" for m in columns]
    note = f"WikiText-2, perplexity and increase over float. Measured: {'; '.join(settings)}.\n\n"
    return note + table(header, rows)


def _over_float(values: dict[str, float], rung: str) -> str:
    if rung not in values:
        return ""
    if rung == "float":
        return f"{values[rung]:.2f}"
    digits = 2 if values[rung] < 1000 else 0
    return f"{values[rung]:.{digits}f} (+{values[rung] - values['float']:.{digits}f})"


def parts(name: str) -> str:
    """What each operand loses, from variants of one network that were measured together."""
    entries = read(name)["results"]
    rows = []
    for e in entries:
        loss, error = (1000 * (e[key] or 0) for key in _LOSS)
        shown = "" if e["rung"] == "float" else f"{loss:.1f} ± {error:.1f}"
        rows.append([e["rung"], f"{e['perplexity']:.2f}", shown])
    e = entries[-1]
    return (
        f"{e['model']}, `{e['recipe']}`, {e['corpus']}, {e['windows']} windows of "
        f"{e['sequence_length']} tokens, calibrated on {e['calibration']}:\n\n"
    ) + table(["rounded", "perplexity", "increase of the loss, thousandths of a nat"], rows)


_LOSS = ("loss_increase", "loss_increase_standard_error")

ACCURACY_TABLES: dict[str, Callable[[str], str]] = {
    "ablation": ablation,
    "accuracy": accuracy,
    "methods": methods,
    "parts": parts,
    "search": search,
    "zeroshot": zeroshot,
}
