"""The section of the report that shows what each part of a recipe is worth."""

from collections.abc import Sequence
from typing import Any

from quatom.evaluation.report_charts import REFERENCE_COLOUR, Series, ladder_chart
from quatom.evaluation.report_model import (
    ATOM_LADDER,
    ATOM_NAME,
    RUNGS,
    Entry,
    Part,
    ReportInputs,
    Section,
    Table,
    increase,
    number,
    unique,
)

_KEY = ("model", "corpus", "windows")


def ladder_section(inputs: ReportInputs) -> Section | None:
    """Ladders of the models measured; Atom's beside its own numbers."""
    entries = inputs.having("rung", "perplexity")
    if not entries:
        return None
    floats = _float_models(inputs)
    parts: list[Part] = []
    for ladder in unique(map(_ladder, entries)):
        own = [entry for entry in entries if _ladder(entry) == ladder]
        if all(entry["rung"] == "float" for entry in own):
            continue  # measured once for all ladders, and shown in each
        parts += _ladder_parts(ladder, own, floats)
    return Section(
        "ladder",
        "Ablation ladder",
        "Each step of Atom's ladder adds to the one above it. Its poster shows another, larger "
        "model: compare the shape of the ladders, not their heights.",
        parts,
    )


def _ladder(entry: Entry) -> str:
    return entry.get("ladder", "atom")


def _in_words(rung: str) -> str:
    return rung.replace("_scale_a_", "_scale per ").replace("_", " ")


def _group(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry[key] for key in _KEY)


def _float_models(inputs: ReportInputs) -> dict[tuple[Any, ...], float]:
    """Perplexity of the float model on the same windows, from whichever file has it."""
    found = {}
    for entry in inputs.having(*_KEY, "perplexity"):
        if entry.get("rung") == "float" or entry.get("recipe") == "fp16":
            found[_group(entry)] = entry["perplexity"]
    return found


def _ladder_parts(
    ladder: str, entries: Sequence[Entry], floats: dict[tuple[Any, ...], float]
) -> list[Part]:
    """Chart and table of one ladder, a column per model and text."""
    columns: dict[str, dict[str, float]] = {}
    for group in unique(map(_group, entries)):
        model, corpus, windows = group
        values = {e["rung"]: e["perplexity"] for e in entries if _group(e) == group}
        if group in floats:
            values["float"] = floats[group]
        columns[f"{model}\n{corpus}, {windows} windows"] = values
    found = unique(rung for values in columns.values() for rung in values)
    rungs = [r for r in RUNGS if r in found] + [r for r in found if r not in RUNGS]
    if ladder == "atom":
        columns[ATOM_NAME] = ATOM_LADDER
    labels = [RUNGS.get(rung) or _in_words(rung) for rung in rungs]
    series = [
        Series(
            name.replace("\n", ", "),
            [values.get(rung) for rung in rungs],
            colour=REFERENCE_COLOUR if name == ATOM_NAME else index % REFERENCE_COLOUR,
        )
        for index, (name, values) in enumerate(columns.items())
    ]
    rows = []
    for rung, label in zip(rungs, labels, strict=True):
        cells = [label]
        for values in columns.values():
            cells += [number(values.get(rung)), increase(values.get(rung), values.get("float"))]
        rows.append(cells)
    header = ["step"]
    for name in columns:
        header += [f"{name}\nperplexity", "over\nfloat"]
    title = "" if ladder == "atom" else f"Ladder: {ladder}"
    chart = ladder_chart(title or "Ablation ladder", labels, series)
    return [
        Part(title=title, chart=chart, legend=series),
        Part(table=Table(header, rows)),
    ]
