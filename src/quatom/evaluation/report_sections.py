"""The sections of the report: entries of result files -> tables and charts."""

import math
from collections.abc import Callable, Sequence

from quatom.evaluation.report_charts import REFERENCE_COLOUR, Series, heat_map, line_chart
from quatom.evaluation.report_checkpoint import bits_section, expected_section
from quatom.evaluation.report_ladder import ladder_section
from quatom.evaluation.report_model import (
    HEADLINE,
    Entry,
    Part,
    ReportInputs,
    Section,
    Table,
    increase,
    number,
    shown_recipe,
    unique,
)
from quatom.evaluation.report_outliers import outliers_section
from quatom.evaluation.report_search import search_section
from quatom.evaluation.standard_error import of_accuracy


def _float_first(recipe: str) -> bool:
    return recipe != "fp16"


def perplexity_section(inputs: ReportInputs) -> Section | None:
    """Perplexity by model and recipe, with the bits that it was had for."""
    entries = inputs.having("recipe", "corpus", "perplexity", "windows")
    if not entries:
        return None
    parts = []
    for model in unique(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model]
        key = ("corpus", "windows", "sequence_length", "all_windows")
        corpora = unique(tuple(entry.get(k) for k in key) for entry in own)
        header = ["recipe", "bits per\nweight", "bits per\nactivation", "bits per\nKV value"]
        for corpus, windows, length, whole in corpora:
            extent = f"all {windows}" if whole else f"first {windows}"
            header += [f"{corpus}\n{extent} windows\nof {length}", "over\nfloat"]
        rows = []
        for recipe in sorted(unique(entry["recipe"] for entry in own), key=_float_first):
            mine = [entry for entry in own if entry["recipe"] == recipe]
            bits = ("bits_per_weight", "bits_per_activation", "bits_per_kv")
            row = [shown_recipe(recipe), *(number(mine[0].get(name)) for name in bits)]
            for corpus in corpora:
                cell = [e for e in mine if tuple(e.get(k) for k in key) == corpus]
                value = cell[-1]["perplexity"] if cell else None
                base = cell[-1].get("float_perplexity") if cell else None
                row += [number(value), increase(value, base)]
            rows.append(row)
        parts.append(Part(title=model, table=Table(header, rows)))
    return Section(
        "perplexity",
        "Perplexity",
        "Lower is better. Bits count everything that is stored: codes, scales and outliers.",
        parts,
    )


def zero_shot_section(inputs: ReportInputs) -> Section | None:
    """Accuracy of tasks: the headline metrics, and every metric in a fold."""
    entries = inputs.having("task", "metric", "value", "examples")
    if not entries:
        return None
    parts = []
    for model in unique(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model]
        recipes = sorted(unique(entry["recipe"] for entry in own), key=_float_first)
        shown = {(e["recipe"], e["task"], e["metric"]): e for e in own}
        tasks = [t for t in HEADLINE if any(e["task"] == t for e in own)]
        header = ["recipe", *(f"{t}\n{HEADLINE[t]}" for t in tasks), "average"]
        rows = []
        for recipe in recipes:
            cells = [shown.get((recipe, task, HEADLINE[task])) for task in tasks]
            values = [cell["value"] for cell in cells if cell is not None]
            complete = len(values) == len(HEADLINE)
            average = number(100 * math.fsum(values) / len(values)) if complete else "–"
            rows.append([shown_recipe(recipe), *map(_accuracy, cells), average])
        note = (
            "Per cent ± one standard error of the sample. The average is over the six tasks of "
            "Atom's table. " + _examples(own)
        )
        if tasks:
            parts.append(Part(title=model, table=Table(header, rows, note)))
        every = [
            [
                shown_recipe(e["recipe"]),
                e["task"],
                e["metric"],
                number(e["value"], 4),
                str(e["examples"]),
            ]
            for e in own
        ]
        head = ("recipe", "task", "metric", "value", "examples")
        parts.append(Part(table=Table(head, every), folded=f"Every metric of {model}"))
    return Section(
        "zero-shot",
        "Zero-shot tasks",
        "Accuracy without examples, by lm-evaluation-harness. Higher is better.",
        parts,
    )


def _accuracy(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    error = of_accuracy(entry)
    return f"{100 * entry['value']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _examples(entries: Sequence[Entry]) -> str:
    """How many examples each task was measured on."""
    counts: dict[str, set[str]] = {}
    for entry in entries:
        extent = "all" if entry.get("all_examples") else "the first"
        counts.setdefault(entry["task"], set()).add(f"{extent} {entry['examples']}")
    extents = unique(" or ".join(sorted(extent)) for extent in counts.values())
    if len(extents) == 1:
        return f"Each task on {extents[0]} examples."
    return (
        "Examples: "
        + ", ".join(f"{t} {' or '.join(sorted(extent))}" for t, extent in counts.items())
        + "."
    )


def layers_section(inputs: ReportInputs) -> Section | None:
    """Error after each block, and of each site of it, of the checkpoints given."""
    if not inputs.layers:
        return None
    parts = []
    lines = [
        Series(layer.name, layer.relative_errors, colour=index % REFERENCE_COLOUR)
        for index, layer in enumerate(inputs.layers)
        if any(error is not None for error in layer.relative_errors)
    ]
    if lines:
        chart = line_chart("Relative error after each block", lines, "block", "relative error")
        parts.append(Part(chart=chart, legend=lines))
    every = [
        e for layer in inputs.layers for errors in layer.linear_errors.values() for e in errors
    ]
    largest = max((error for error in every if error is not None), default=0.0) or 1.0
    for layer in inputs.layers:
        sites = [Series(site, errors) for site, errors in layer.linear_errors.items()]
        chart = heat_map(f"Output error of each site of {layer.name}", sites, "block", largest)
        parts.append(Part(title=f"{layer.name}: output error of each site", chart=chart))
        rows = [
            [str(block), number(error, 4)]
            + [number(errors[block], 4) for errors in layer.linear_errors.values()]
            for block, error in enumerate(layer.relative_errors)
        ]
        header = ["block", "hidden state", *layer.linear_errors]
        parts.append(Part(table=Table(header, rows), folded=f"Numbers of {layer.name}"))
    return Section(
        "layers",
        "Error per layer",
        "Norm of the difference over the norm of the float result, on calibration text: of the "
        "hidden states after each block, where errors of earlier blocks add up, and of each "
        f"site's own output, where darker is larger, up to {largest:.3g}, in all of them alike.",
        parts,
    )


def figures_section(inputs: ReportInputs) -> Section | None:
    """Pictures that were given, such as the outlier figure."""
    if not inputs.images:
        return None
    parts = [Part(image=data, caption=caption) for caption, data in inputs.images]
    return Section("figures", "Figures", "", parts)


def sizes_section(inputs: ReportInputs) -> Section | None:
    """Checkpoints: size, and what making them took."""
    entries = inputs.having("recipe", "checkpoint_bytes")
    if not entries:
        return None
    rows = [
        [
            f"{entry['model']}, {entry['recipe']}",
            number(entry["checkpoint_bytes"] / 1e6, 1),
            number(entry.get("bits_per_weight")),
            _sample(entry),
            number(entry.get("seconds"), 1),
            number(entry.get("peak_rss_gb"), 1),
            number(entry.get("peak_gpu_gb"), 1),
        ]
        for entry in entries
    ]
    header = (
        "checkpoint",
        "size, MB",
        "bits per\nweight",
        "calibration\ntokens",
        "seconds",
        "peak\nmemory, GB",
        "peak GPU\nmemory, GB",
    )
    text = "Embeddings, output head and norms stay in floating point and are counted in the size."
    known = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    table = Table([header[i] for i in known], [[row[i] for i in known] for row in rows])
    return Section("sizes", "Sizes", text, [Part(table=table)])


def _sample(entry: Entry) -> str:
    """Calibration sequences and their length; a dash where a recipe reads no text."""
    count, length = entry.get("samples"), entry.get("sequence_length")
    return "–" if count is None or length is None else f"{count} × {length}"


def other_section(inputs: ReportInputs) -> Section | None:
    """Measurements of other kinds, unabridged, so that nothing given is left out in silence."""
    known: tuple[set[str], ...] = ({"rung"}, {"corpus", "perplexity"}, {"task", "metric"})
    known += ({"checkpoint_bytes"}, {"curve"})
    parts = []
    for file in inputs.files:
        rest = [e for e in file.entries if not any(keys <= e.keys() for keys in known)]
        if rest:
            header = unique(key for entry in rest for key in entry)
            rows = [[_plain(entry.get(key)) for key in header] for entry in rest]
            parts.append(Part(table=Table(header, rows), folded=f"{file.name} ({len(rest)})"))
    return Section("other", "Other measurements", "", parts) if parts else None


def _plain(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def origin_section(inputs: ReportInputs) -> Section | None:
    """Where every number comes from."""
    if not inputs.files:
        return None
    rows = []
    for file in inputs.files:
        where = file.environment
        machine = where.get("gpu") or f"{where.get('cpu', '?')}, {where.get('cores', '?')} cores"
        versions = f"torch {where.get('torch', '?')}, python {where.get('python', '?')}"
        commit = f"{where.get('date', '?')}, {where.get('commit', '?')}"
        rows.append([file.name, file.command, commit, machine, versions])
    header = ("file", "command", "date and commit", "machine", "software")
    return Section("origin", "Origin", "", [Part(table=Table(header, rows), prose=True)])


SECTIONS: tuple[Callable[[ReportInputs], Section | None], ...] = (
    ladder_section,
    perplexity_section,
    zero_shot_section,
    layers_section,
    bits_section,
    search_section,
    outliers_section,
    figures_section,
    sizes_section,
    expected_section,
    other_section,
    origin_section,
)
"""The sections of a page in their order; one without data is left out."""
