"""Charts as inline SVG: no script, no font, no file beside the page.

Colours are the page's CSS variables, so that a chart follows its light or dark scheme. Every mark
carries its number as a tooltip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

NUM_COLOURS = 6
"""Series colours that the page defines, --series-0 and on."""
REFERENCE_COLOUR = NUM_COLOURS - 1
"""The grey one, for numbers that were not measured here."""

_WIDTH = 1000
_LABEL = 190  # least room for row labels, left of the plot
_LETTER = 7.5  # width of a letter of 13 pixels, and a little more


@dataclass(frozen=True, slots=True)
class Series:
    """Named numbers of a chart, one for each row or step; None where there is none."""

    name: str
    values: Sequence[float | None]
    colour: int = 0
    """Which of the page's series colours."""


def _svg(height: float, title: str, parts: Sequence[str], width: int = _WIDTH) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _room(labels: Sequence[str], least: float = _LABEL) -> float:
    """Room that row labels need left of the plot."""
    return max(least, 20 + _LETTER * max(map(len, labels)))


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from just below `low` to just above `high`, thinned out."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[first : last + 1]


def linear_ticks(high: float) -> list[float]:
    """About five round steps from 0 to just above `high`."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def ladder_chart(title: str, rows: Sequence[str], series: Sequence[Series]) -> Markup:
    """A row per rung and a dot per series, on a logarithmic axis of perplexity."""
    known = [value for one in series for value in one.values if value is not None]
    ticks = log_ticks(min(known), max(known))
    left, right, top, step = _room(rows), _WIDTH - 40, 34, 30
    scale = (right - left) / math.log(ticks[-1] / ticks[0])

    def x(value: float) -> float:
        return left + scale * math.log(value / ticks[0])

    bottom = top + step * len(rows)
    parts = []
    for tick in ticks:
        parts.append(_line(x(tick), top - 8, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 16, f"{tick:g}", "middle", "tick"))
    for row, name in enumerate(rows):
        y = top + step * (row + 0.5)
        parts.append(_text(left - 12, y + 4, name, "end"))
        parts.append(_line(left, y, right, y, "grid"))
    for one in series:
        points = [
            (x(value), top + step * (row + 0.5), value)
            for row, value in enumerate(one.values)
            if value is not None
        ]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f'<polyline points="{path}" class="line s{one.colour}"/>')
        for px, py, value in points:
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="dot s{one.colour}">'
                f"<title>{escape(one.name)}: {value:.2f}</title></circle>"
            )
    parts.append(_text(right, bottom + 34, "perplexity, logarithmic", "end", "tick"))
    return _svg(bottom + 44, title, parts)


def line_chart(title: str, series: Sequence[Series], x_name: str, y_name: str) -> Markup:
    """A line per series over steps 0, 1, ...; the vertical axis begins at 0."""
    steps = max(len(one.values) for one in series)
    known = [value for one in series for value in one.values if value is not None]
    ticks = linear_ticks(max(known))
    left, right, top, bottom = 60, _WIDTH - 16, 26, 240

    def x(step: float) -> float:
        return left + (right - left) * step / max(steps - 1, 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / ticks[-1]

    parts = [_text(left - 50, 14, y_name, kind="tick")]
    for tick in ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", "end", "tick"))
    for step in range(0, steps, max(1, steps // 10)):
        parts.append(_text(x(step), bottom + 18, str(step), "middle", "tick"))
    parts.append(_text(right, bottom + 36, x_name, "end", "tick"))
    for one in series:
        points = [(x(i), y(v), i, v) for i, v in enumerate(one.values) if v is not None]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        parts.append(f'<polyline points="{path}" class="line s{one.colour}"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" class="dot s{one.colour}">'
            f"<title>{escape(one.name)}, {escape(x_name)} {i}: {v:.4f}</title></circle>"
            for px, py, i, v in points
        ]
    return _svg(bottom + 44, title, parts)


def curve_chart(
    title: str,
    curve: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, float, str]],
    x_name: str,
    y_name: str,
) -> Markup:
    """A line through points (x, y), and named points on it; the vertical axis begins at 0."""
    first, last = curve[0][0], curve[-1][0]
    ticks = linear_ticks(max(y for _, y in curve))
    left, right, top, bottom = 60, _WIDTH - 16, 26, 240

    def x(value: float) -> float:
        return left + (right - left) * (value - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / ticks[-1]

    parts = [_text(left - 50, 14, y_name, kind="tick")]
    for tick in ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", "end", "tick"))
    for step in range(6):
        value = first + (last - first) * step / 5
        parts.append(_text(x(value), bottom + 18, f"{value:.2f}", "middle", "tick"))
    parts.append(_text(right, bottom + 36, x_name, "end", "tick"))
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve)
    parts.append(f'<polyline points="{path}" class="line s0"/>')
    for colour, points in ((0, [(a, b, "") for a, b in curve]), (1, marks)):
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{3 + 3 * colour}" class="dot s{colour}">'
            f"<title>{escape(name)} {a:.3f} {escape(x_name)}: {b:.4f}</title></circle>"
            for a, b, name in points
        ]
    return _svg(bottom + 44, title, parts)


def heat_map(title: str, rows: Sequence[Series], x_name: str, largest: float) -> Markup:
    """A row per series and a cell per step; the darker, the nearer to `largest`."""
    steps = max(len(one.values) for one in rows)
    left, top, height = _room([one.name for one in rows], 90), 6, 24
    cell = (_WIDTH - left - 16) / steps
    parts = []
    for row, one in enumerate(rows):
        y = top + row * height
        parts.append(_text(left - 10, y + 16, one.name, "end"))
        parts += [
            f'<rect x="{left + i * cell:.1f}" y="{y}" width="{max(cell - 1, 1):.1f}" '
            f'height="{height - 2}" class="cell" fill-opacity="{v / largest:.3f}">'
            f"<title>{escape(one.name)}, {escape(x_name)} {i}: {v:.4f}</title></rect>"
            for i, v in enumerate(one.values)
            if v is not None
        ]
    bottom = top + height * len(rows)
    parts += [
        _text(left + (step + 0.5) * cell, bottom + 14, str(step), "middle", "tick")
        for step in range(0, steps, max(1, steps // 10))
    ]
    parts.append(_text(_WIDTH - 16, bottom + 30, x_name, "end", "tick"))
    return _svg(bottom + 36, title, parts)


def bar_chart(title: str, rows: Sequence[str], series: Series, x_name: str) -> Markup:
    """A bar per row, from 0, with its number beside it."""
    known = [value for value in series.values if value is not None]
    ticks = linear_ticks(max(known))
    left, right, top, step = _room(rows), _WIDTH - 70, 10, 26
    scale = (right - left) / ticks[-1]
    bottom = top + step * len(rows)
    parts = []
    for tick in ticks:
        x = left + scale * tick
        parts.append(_line(x, top, x, bottom, "grid"))
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle", "tick"))
    for row, (name, value) in enumerate(zip(rows, series.values, strict=True)):
        y = top + step * row
        parts.append(_text(left - 12, y + 17, name, "end"))
        if value is None:
            continue
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{max(scale * value, 1):.1f}" height="{step - 8}" '
            f'class="cell"><title>{escape(name)}: {value:.3f} {escape(x_name)}</title></rect>'
        )
        parts.append(_text(left + scale * value + 6, y + 17, f"{value:.3f}", kind="tick"))
    parts.append(_text(right, bottom + 34, x_name, "end", "tick"))
    return _svg(bottom + 44, title, parts)


def panels(
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    shaded: int,
    y_name: str,
) -> Markup:
    """Curves side by side on one vertical axis; the last `shaded` steps of the last are marked."""
    top, bottom, gap, first = 40, 170, 24, 56
    width = (_WIDTH - first - gap * len(names)) / len(names)
    ticks = linear_ticks(max(max(curve) for curve in values))

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / ticks[-1]

    parts = [_text(6, 14, y_name, kind="tick")]
    for tick in ticks:
        parts.append(_text(first - 8, y(tick) + 4, f"{tick:g}", "end", "tick"))
    for index, (name, curve) in enumerate(zip(names, values, strict=True)):
        left = first + index * (width + gap)
        scale = width / max(len(curve) - 1, 1)
        parts.append(_text(left, 32, name, kind="tick"))
        parts += [_line(left, y(tick), left + width, y(tick), "grid") for tick in ticks]
        if index == len(names) - 1 and shaded < len(curve):
            parts.append(
                f'<rect x="{left + width - scale * shaded:.1f}" y="{top}" '
                f'width="{scale * shaded:.1f}" height="{bottom - top}" class="shade"/>'
            )
        path = " ".join(f"{left + scale * i:.1f},{y(v):.1f}" for i, v in enumerate(curve))
        parts.append(f'<polyline points="{path}" class="line s0"/>')
        parts.append(_text(left, bottom + 18, "0", "start", "tick"))
        parts.append(_text(left + width, bottom + 18, f"channel {len(curve) - 1}", "end", "tick"))
    return _svg(bottom + 28, title, parts)
