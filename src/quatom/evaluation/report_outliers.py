"""The section of the report on activation outliers, from what `quatom inspect --json` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quatom.errors import CalibrationError
from quatom.evaluation.report_charts import panels
from quatom.evaluation.report_model import (
    OutlierReport,
    Part,
    ReportInputs,
    Section,
    SiteOutliers,
    Table,
    number,
)

KEPT = 128
"""Channels that the presets keep in INT8."""


def read_outliers(path: Path, content: dict[str, Any]) -> OutlierReport:
    """What `quatom inspect --json` wrote of a floating-point model.

    Raises:
        CalibrationError: the file is damaged.
    """
    try:
        sites = []
        for name, site in content["sites"].items():
            largest = [float(value) for value in site["absmax"]]
            order = [int(channel) for channel in site["order"]]
            if sorted(order) != list(range(len(largest))) or not order:
                raise ValueError(f"order of {name} is no order of {len(largest)} channels")
            sites.append(SiteOutliers(name, largest, [largest[channel] for channel in order]))
        return OutlierReport(path.stem, int(content["layer"]), int(content["tokens"]), sites)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} holds no measured outliers: {error!r}") from None


def outliers_section(inputs: ReportInputs) -> Section | None:
    """Largest magnitude of each channel, as they come and with the outliers set apart."""
    if not inputs.outliers:
        return None
    parts = []
    for report in inputs.outliers:
        place = f"{report.name}, block {report.layer}"
        parts += [
            Part(
                chart=panels(
                    f"Channels of {site.name}, {place}",
                    ("as they come", "by second moment, INT8 channels shaded"),
                    (site.largest, site.ordered),
                    shaded=KEPT,
                    y_name=f"{site.name}: largest |x|",
                ),
                title=place if site is report.sites[0] else "",
            )
            for site in report.sites
        ]
        rows = [
            [
                site.name,
                str(len(site.largest)),
                number(_over_median(site.ordered), 1),
                number(_over_median(site.ordered[:-KEPT]), 1),
            ]
            for site in report.sites
        ]
        header = ("input of", "channels", "largest over\nmedian, before", "after")
        note = f"Measured on {report.tokens:,} tokens."
        parts.append(Part(table=Table(header, rows, note)))
    text = (
        "The largest magnitude of each input channel. A few channels are far above the rest, and "
        "one scale for all would be set by them. Recipes with outliers sort channels by their mean "
        f"square and keep the {KEPT} largest in INT8; after that the scale is set by the rest."
    )
    return Section("outliers", "Outliers before and after", text, parts)


def _over_median(values: Sequence[float]) -> float | None:
    """Largest over median; None where there is none."""
    ordered = sorted(values)
    median = ordered[len(ordered) // 2] if ordered else 0.0
    return ordered[-1] / median if median > 0.0 else None
