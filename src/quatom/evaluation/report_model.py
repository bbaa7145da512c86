"""What a report reads, and what its page is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from quatom.evaluation.report_charts import Series
from quatom.plan import ModelPlan

Entry = dict[str, Any]
"""One measurement of a result file."""

RUNGS = {
    "float": "floating point",
    "rtn": "W4A4 round to nearest",
    "outliers_fp16": "+ outliers in FP16",
    "outliers_int8": "+ outliers in INT8",
    "groups": "+ groups of 128",
    "clipping": "+ clipping",
    "gptq": "+ GPTQ",
    "kv4": "+ INT4 KV cache",
}
"""The ladder of Atom's ablation, from the floating-point model down."""

ATOM_LADDER = {
    "float": 5.68,
    "rtn": 2315.52,
    "outliers_fp16": 11.34,
    "outliers_int8": 11.39,
    "groups": 6.22,
    "clipping": 6.13,
    "gptq": 6.04,
    "kv4": 6.16,
}
"""Atom's own numbers: Llama-7B, WikiText-2 (Zhao et al., MLSys 2024, poster and table 4)."""

ATOM_NAME = "Atom's poster\nLlama-7B"

HEADLINE = {
    "piqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
}
"""The metric of each task in Atom's table, whose six values it averages."""


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One result file."""

    name: str
    command: str
    environment: dict[str, Any]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What quantizing each block of a checkpoint cost."""

    name: str
    relative_errors: tuple[float | None, ...]
    linear_errors: dict[str, tuple[float | None, ...]]
    plan: ModelPlan | None = None
    """What the checkpoint stores; None where its report alone was given."""


@dataclass(frozen=True, slots=True)
class SiteOutliers:
    """Largest magnitudes of the channels that enter one site."""

    name: str
    largest: Sequence[float]
    ordered: Sequence[float]
    """The same by ascending second moment."""


@dataclass(frozen=True, slots=True)
class OutlierReport:
    """Activation magnitudes of one block of a floating-point model."""

    name: str
    layer: int
    tokens: int
    sites: Sequence[SiteOutliers]


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """All that a page shows."""

    files: tuple[ResultFile, ...]
    layers: tuple[LayerReport, ...]
    images: tuple[tuple[str, str], ...]
    """Caption and data: URI."""
    outliers: tuple[OutlierReport, ...] = ()
    gpus: tuple[str, ...] = ()
    """GPUs to compute expectations for."""

    @property
    def entries(self) -> list[Entry]:
        """The entries of all files."""
        return [entry for file in self.files for entry in file.entries]

    def having(self, *keys: str) -> list[Entry]:
        """Entries with all of these keys."""
        return [entry for entry in self.entries if all(key in entry for key in keys)]


@dataclass(frozen=True, slots=True)
class Table:
    """Header and rows of text; the first cell of a row names it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A chart, a picture or a table of a section."""

    title: str = ""
    chart: Markup | None = None
    legend: Sequence[Series] = ()
    image: str = ""
    caption: str = ""
    table: Table | None = None
    folded: str = ""
    """Label of the fold that hides the table; empty: it is open."""
    prose: bool = False
    """Whether the table's cells are text instead of numbers."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is under it."""

    id: str
    title: str
    text: str
    parts: Sequence[Part]


def unique(items: Iterable[Any]) -> list[Any]:
    """The items without repetitions, in their order."""
    return list(dict.fromkeys(items))


def shown_recipe(name: str) -> str:
    """The name of a recipe in a table: what `fp16` leaves in floating point may have 32 bits."""
    return "float" if name == "fp16" else name


def number(value: object, digits: int = 2) -> str:
    """A number with thousands set apart, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def increase(value: float | None, base: float | None) -> str:
    """By how much a perplexity exceeds the float model's; empty for that model itself."""
    if value is None or base is None:
        return "–"
    if value == base:
        return ""
    return f"× {value / base:,.0f}" if value > 10 * base else f"{100 * (value / base - 1):+.1f} %"
