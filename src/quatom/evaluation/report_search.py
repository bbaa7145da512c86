"""The section of the report that draws bits against error, from `quatom search --json`."""

from typing import Any

from quatom.evaluation.report_charts import curve_chart
from quatom.evaluation.report_model import Entry, Part, ReportInputs, Section, Table, number


def search_section(inputs: ReportInputs) -> Section | None:
    """Every search: its curve, what was chosen, and the formats that gained most."""
    entries = inputs.having("curve", "base", "options", "mean_bits", "expected_divergence")
    if not entries:
        return None
    return Section(
        "search",
        "Bits against error",
        "Formats per layer and site above a base recipe. Error is the sum over blocks of the KL "
        "divergence, in nats per token, of the network in which that block alone is quantized. "
        "It is computed from the errors of single places, which were measured; "
        "quatom eval --reference measures the divergence of a whole checkpoint.",
        [part for entry in entries for part in _parts(entry)],
    )


def _parts(entry: Entry) -> list[Part]:
    title = f"{entry['model']}: {entry['recipe']} above {entry['base']}"
    ends = (
        (entry["base_mean_bits"], entry["base_divergence"], entry["base"]),
        (entry["mean_bits"], entry["expected_divergence"], entry["recipe"]),
    )
    raised = ", ".join(entry["raised"])
    chart = curve_chart(title, entry["curve"], ends, f"bits, mean of {raised}", "nats per token")
    rows = [[name, number(bits, 3), number(error, 4)] for bits, error, name in ends]
    table = Table(["recipe", f"bits, mean of\n{raised}", "expected error,\nnats per token"], rows)
    parts = [Part(title=title, chart=chart), Part(table=table)]
    chosen = [option for option in entry["options"] if option["chosen"]]
    if chosen:
        chosen.sort(key=lambda option: -option["gain"] / option["bits"])
        header = ["place", "option", "adds bits", "gains nats\nper token"]
        label = f"{len(chosen)} places raised, by gain per bit"
        parts.append(Part(table=Table(header, [_row(o) for o in chosen]), folded=label))
    return parts


def _row(option: dict[str, Any]) -> list[str]:
    place = f"layer {option['layer']} {option['place']}"
    return [place, option["option"], number(option["bits"], 4), number(option["gain"], 5)]
