"""Scales of weight groups: from a constant clip ratio, or searched by reconstruction error.

The search tries clip ratios from 1.0 downwards and keeps, for each group (of `rows_per_scale`
rows), the scale with the least

    sum_j importance[j] * (w[j] - scale * round(w[j] / scale))**2

With importance 1 that is the squared error of the weights; with the second moment of input
channel j it estimates the squared error of the layer's output. A matrix of importance, the second
moments of the group's channels, gives the squared error of the group's share of the output.
"""

import torch
from torch import Tensor

from quatom.numerics.formats import Format
from quatom.numerics.groups import MIN_SCALE
from quatom.numerics.multiples import nearest_multiple

SEARCH_RATIOS = tuple(1.0 - 0.025 * step for step in range(25))
"""1.0 down to 0.4: below, saturation always costs more than finer steps bring."""


def _share_rows(values: Tensor, rows_per_scale: int, reduce: str) -> Tensor:
    """(N, ...) -> (N / rows_per_scale, ...): the maximum or sum of adjacent rows."""
    missing = -values.shape[0] % rows_per_scale
    if missing:
        values = torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
    grouped = values.unflatten(0, (-1, rows_per_scale))
    return grouped.amax(dim=1) if reduce == "max" else grouped.sum(dim=1)


def _expand_rows(scales: Tensor, rows_per_scale: int, rows: int) -> Tensor:
    return scales.repeat_interleave(rows_per_scale, dim=0)[:rows]


def weight_scales(
    weight: Tensor,  # (N, C) the channels of one group
    fmt: Format,
    *,
    clip_ratio: float = 1.0,
    rows_per_scale: int = 1,
    ratios: tuple[float, ...] = (),
    importance: Tensor | None = None,  # (C,)
    row_scales: Tensor | None = None,  # (N,)
) -> Tensor:
    """Scale of one group of channels for every row, (N,) float16.

    Args:
        clip_ratio: fraction of the absolute maximum on the largest code; the upper bound of the
            ratios when searching.
        rows_per_scale: adjacent rows that share a scale.
        ratios: candidates relative to clip_ratio; empty takes clip_ratio itself.
        importance: weight of each channel's squared error in the search, (C,), or of each product
            of two errors, (C, C); None: all equal.
        row_scales: scales must be multiples of these, see `quatom.numerics.multiples`; rows that
            share scales share this too.
    """
    rows = weight.shape[0]
    weight = weight.float()
    absmax = _share_rows(weight.abs().amax(dim=1), rows_per_scale, "max") * clip_ratio

    steps = None if row_scales is None else row_scales[::rows_per_scale]

    def scale_of(ratio: float) -> Tensor:
        scale = (absmax * ratio / fmt.largest).clamp(min=MIN_SCALE)
        return (scale if steps is None else nearest_multiple(scale, steps)).half()

    best = scale_of(1.0)
    if not ratios:
        return _expand_rows(best, rows_per_scale, rows)
    best_error = torch.full_like(absmax, float("inf"))
    for ratio in ratios:
        scale = scale_of(ratio)
        step = _expand_rows(scale, rows_per_scale, rows).float().unsqueeze(1)
        error = _cost(fmt.round(weight / step) * step - weight, importance)
        error = _share_rows(error, rows_per_scale, "sum")
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return _expand_rows(best, rows_per_scale, rows)


def _cost(error: Tensor, importance: Tensor | None) -> Tensor:  # (N, C) -> (N,)
    if importance is None:
        return error.square_().sum(dim=1)
    if importance.dim() == 1:
        return error.square_() @ importance.float()
    return ((error @ importance.float()) * error).sum(dim=1)
