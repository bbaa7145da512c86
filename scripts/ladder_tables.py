"""Tables of ladders of recipes, and of formats under a budget; functions as in update_tables.py."""

from collections.abc import Callable
from typing import Any

from result_files import exists, label, machines, matching, read, table

from quatom.evaluation.ladders import LADDERS, formats_of
from quatom.presets import PRESETS
from quatom.recipe import Recipe

ACCURACY_FILES = ("gemma-3-270m", "qwen2.5-coder-0.5b")
"""Models whose checkpoints are columns of the table of methods where no ladder was measured."""
_LOSS = ("loss_increase", "loss_increase_standard_error")

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


def search(name: str) -> str:
    """What searches under a budget expect of the recipes that they found."""
    data = read(name)
    rows: list[list[str]] = []
    for e in data["results"]:
        for recipe, bits, error in (
            ("base", "base_mean_bits", "base_divergence"),
            ("recipe", "mean_bits", "expected_divergence"),
        ):
            shown = [f"{e[bits]:.3f}", f"{e[error]:.3f}"]
            row = [e["model"], ", ".join(e["raised"]), label(e[recipe]), *shown]
            if row not in rows:  # several searches begin with the same recipe
                rows.append(row)
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
    for file in ACCURACY_FILES:
        if exists(f"accuracy-{file}") and file not in columns:
            own = [e for e in read(f"accuracy-{file}")["results"] if e["corpus"] == "wikitext2"]
            values = {e["recipe"].replace("-", "_"): e["perplexity"] for e in own}
            columns[file] = {"float": values.pop("fp16")} | values
            which = "all" if own[0]["all_windows"] else "the first"
            settings.append(f"{file} on {which} {own[0]['windows']} windows, as checkpoints")
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


LADDER_TABLES: dict[str, Callable[[str], str]] = {
    "ablation": ablation,
    "methods": methods,
    "parts": parts,
    "search": search,
}
