"""Coordinate descent on rounded weights: every code moved to where the others leave it best.

GPTQ decides a column once, knowing nothing of the codes behind it. A sweep visits all columns again
and rounds each to the minimum of ||(Q - W) X||**2 along it, all other codes as they are. The error
never grows, and scales stay.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quatom.numerics.formats import Format
from quatom.numerics.groups import expand_scales
from quatom.numerics.rounding import BLOCK, RoundedWeight


def coordinate_descent(
    weight: Tensor,  # (N, K) reordered
    rounded: RoundedWeight,
    formats: Sequence[Format],  # K of them
    second_moment: Tensor,  # (K, K) float32, X^T X of the reordered, quantized inputs
    damping: float,
    sweeps: int,
) -> RoundedWeight:
    """Codes after `sweeps` visits of all columns in stored order; damping as in GPTQ."""
    diagonal = second_moment.diagonal()
    moment = second_moment + torch.diag((damping * diagonal.mean()).expand_as(diagonal))
    if not bool((moment.diagonal() > 0).all()):
        return rounded  # no input at all: any codes do
    steps = expand_scales(rounded.scales, rounded.layout)
    # Columns as rows, which are contiguous.
    steps, values = steps.t().contiguous(), rounded.values.t().contiguous()
    slope = moment @ (values * steps - weight.float().t())  # half the gradient, (K, N)
    for _ in range(sweeps):
        for start in range(0, len(values), BLOCK):
            block = slice(start, min(start + BLOCK, len(values)))
            own, moved = moment[block, block], torch.zeros_like(values[block])
            local = slope[block].clone()
            for j, fmt in enumerate(formats[block]):
                column, step = values[start + j], steps[start + j]
                code = fmt.round(column - local[j] / (own[j, j] * step))
                moved[j] = (code - column) * step
                local.addr_(own[j], moved[j])
                values[start + j] = code
            slope += moment[:, block] @ moved
    return RoundedWeight(values.t().contiguous(), rounded.scales, rounded.layout)
