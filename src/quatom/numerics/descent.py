"""Coordinate descent on rounded weights: every code moved to where the others leave it best.

GPTQ decides a column once, knowing nothing of the codes after it. A sweep visits all columns again
and rounds each to the minimum of ||(Q - W) X||**2 along it, all other codes as they are. The error
never grows, and scales stay.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quatom.numerics.formats import Format
from quatom.numerics.groups import expand_scales
from quatom.numerics.rounding import RoundedWeight

BLOCK = 64
"""Columns that are visited before the others hear of it, in one product."""


def visit_columns(
    values: Tensor,  # (C, N) float32, codes; columns of the weight as rows
    steps: Tensor,  # (C, N) float32, the scale of every code
    slope: Tensor,  # (C, N) float32, half the gradient of the error by the weights
    moment: Tensor,  # (C, C) float32, damped second moments of these columns
    formats: Sequence[Format],  # C of them
) -> Tensor:
    """A visit to every column of a block: codes (C, N) float32."""
    codes, slope = torch.empty_like(values), slope.clone()
    for j, fmt in enumerate(formats):
        codes[j] = fmt.round(values[j] - slope[j] / (moment[j, j] * steps[j]))
        slope[j + 1 :].addr_(moment[j, j + 1 :], (codes[j] - values[j]) * steps[j])
    return codes


VisitColumns = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Format]], Tensor]
"""`visit_columns`, or a kernel that does the same."""


def coordinate_descent(
    weight: Tensor,  # (N, K) reordered
    rounded: RoundedWeight,
    formats: Sequence[Format],  # K of them
    second_moment: Tensor,  # (K, K) float32, X^T X of the reordered, quantized inputs
    damping: float,
    sweeps: int,
    visit: VisitColumns = visit_columns,
) -> RoundedWeight:
    """Codes after `sweeps` visits to all columns in stored order; damping as in GPTQ."""
    diagonal = second_moment.diagonal()
    moment = second_moment + torch.diag((damping * diagonal.mean()).expand_as(diagonal))
    if not bool((moment.diagonal() > 0).all()):
        return rounded  # no input at all: any codes do
    # Columns as rows, which are contiguous.
    steps = expand_scales(rounded.scales, rounded.layout).t().contiguous()
    values = rounded.values.t().contiguous()
    slope = moment @ (values * steps - weight.float().t())
    for _ in range(sweeps):
        for start in range(0, len(values), BLOCK):
            block = slice(start, min(start + BLOCK, len(values)))
            own = moment[block, block].contiguous()
            codes = visit(values[block], steps[block], slope[block], own, formats[block])
            slope += moment[:, block] @ ((codes - values[block]) * steps[block])
            values[block] = codes
    return RoundedWeight(values.t().contiguous(), rounded.scales, rounded.layout)
