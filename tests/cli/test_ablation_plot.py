"""The picture of `quatom ablate --plot`: every bar has a length, and every label room."""

import math

import pytest
from matplotlib.figure import Figure

from quatom.cli.ablate import _plot


@pytest.mark.parametrize("values", [[29.2, 12891.4, 48.47], [29.2, 30.1, 28.0], [5.68, 2315.52]])
def test_bars_and_labels_are_whole(values, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    names = [f"rung {i}" for i in range(len(values))]
    entries = [
        {"rung": name, "perplexity": value, "corpus": "c", "model": "m"}
        for name, value in zip(names, values, strict=True)
    ]
    _plot(entries, tmp_path / "x.png")
    (figure,) = kept
    figure.canvas.draw()
    (axis,) = figure.axes
    frame = axis.get_window_extent()
    for label in axis.texts:
        box = label.get_window_extent()
        assert frame.x0 < box.x0 < box.x1 <= frame.x1
    low, _ = axis.get_xlim()
    assert all(math.log(value / low) > 0.05 for value in values)
