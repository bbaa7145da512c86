"""Weights to codes: round to nearest, or GPTQ's rounding with error feedback.

Both take the weight with its input channels already in reordered position and return codes and
scales in the layout that a checkpoint stores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quatom.errors import QuantizationError
from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import Format
from quatom.numerics.groups import GroupLayout, expand_scales
from quatom.numerics.multiples import WEIGHT_MULTIPLE, find_row_scales
from quatom.numerics.reorder import inverse_order


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """How weights of one linear are rounded; fields as in `quatom.recipe.WeightSpec`."""

    normal: Format
    outlier: Format
    clip_ratio: float = 1.0
    clip_search: str = "none"
    rows_per_scale: int = 1
    damping: float = 0.01
    column_order: str = "stored"
    scale_format: str = "float16"
    find_scales: Callable[..., Tensor] = weight_scales
    """`weight_scales`, or a kernel that does the same."""

    def group_scales(
        self,
        weight: Tensor,  # (N, K)
        columns: slice,
        is_outlier: bool,
        moment: Tensor | None,  # (K, K) second moments of the inputs
        row_scales: Tensor | None = None,  # (N,) of `find_row_scales`
    ) -> Tensor:  # (N,) float16
        """Scale of one group for every row. Outliers have a scale per row and are not clipped."""
        weight = weight[:, columns]
        if is_outlier:
            if not self.outlier.is_quantized:
                return torch.ones(weight.shape[0], dtype=torch.float16, device=weight.device)
            return self.find_scales(weight, self.outlier)
        return self.find_scales(
            weight,
            self.normal,
            clip_ratio=self.clip_ratio,
            rows_per_scale=self.rows_per_scale,
            ratios=() if self.clip_search == "none" else SEARCH_RATIOS,
            importance=self._importance(columns, moment),
            row_scales=row_scales,
        )

    def _importance(self, columns: slice, moment: Tensor | None) -> Tensor | None:
        """What a clip search weighs the errors of a group with, (C,) or (C, C)."""
        if moment is None or self.clip_search in ("none", "mse"):
            return None
        own = moment[columns, columns]
        return own.diagonal() if self.clip_search == "output" else own

    def formats(self, layout: GroupLayout) -> list[Format]:
        """Of every column."""
        return [self.normal] * layout.normal + [self.outlier] * layout.outliers

    def find_row_scales(
        self, weight: Tensor, layout: GroupLayout, moment: Tensor | None
    ) -> Tensor | None:  # (N, K) -> (N,) float32
        """What the scales of a row must be multiples of, fixed once; None where they are free."""
        if self.scale_format == "float16":
            return None
        scales = [
            self.group_scales(weight, columns, False, moment)
            for columns in _group_columns(layout)[: layout.num_normal_groups]
        ]
        return find_row_scales(torch.stack(scales, dim=1), WEIGHT_MULTIPLE)


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """Codes and scales of one linear, and what rounding cost."""

    values: Tensor  # (N, K) float32, values of the formats in units of the scales
    scales: Tensor  # (N, S) float16
    layout: GroupLayout

    def dequantize(self) -> Tensor:
        """(N, K) float32 with channels in reordered position."""
        return self.values * expand_scales(self.scales, self.layout)


def round_to_nearest(
    weight: Tensor,  # (N, K) reordered
    layout: GroupLayout,
    options: RoundingOptions,
    moment: Tensor | None = None,  # (K, K) second moments of the inputs
) -> RoundedWeight:
    """Round every weight alone."""
    scales, values = [], []
    row_scales = options.find_row_scales(weight, layout, moment)
    for group, columns in enumerate(_group_columns(layout)):
        is_outlier = group >= layout.num_normal_groups
        scale = options.group_scales(weight, columns, is_outlier, moment, row_scales)
        fmt = options.outlier if is_outlier else options.normal
        values.append(fmt.round(weight[:, columns].float() / scale.float().unsqueeze(1)))
        scales.append(scale)
    return RoundedWeight(torch.cat(values, dim=1), torch.stack(scales, dim=1), layout)


def inverse_factor(
    second_moment: Tensor,  # (K, K)
    damping: float,
) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment, (K, K) float32.

    Raises:
        QuantizationError: the damped matrix is not positive definite, or not finite.
    """
    moment = second_moment.to(torch.float64, copy=True)
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise QuantizationError("second moments of the inputs are not finite")
    # Channels that are always zero: any value does, so let them be their own unit problem.
    dead = diagonal == 0
    diagonal += damping * mean + dead.double() * max(mean.item(), 1.0)
    # Read backwards, H = R R^T with R upper triangular; then H^-1 = U^T U with U = R^-1.
    factor, failed = torch.linalg.cholesky_ex(moment.flip((0, 1)))
    size = moment.shape[0]
    if failed.item():
        raise QuantizationError(
            f"second moments ({size} x {size}) are not positive definite at damping {damping}: the "
            f"trailing minor of order {failed.item()} fails"
        )
    upper = factor.flip((0, 1))
    del moment, factor
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    if not torch.isfinite(inverse).all():
        raise QuantizationError(
            f"the inverse of the second moments ({size} x {size}) is not finite at damping "
            f"{damping}"
        )
    return inverse.float().contiguous()


def shift_to_target(
    weight: Tensor,  # (N, K) reordered
    second_moment: Tensor,  # (K, K) X^T X of the quantized inputs
    target_moment: Tensor,  # (N, K) Y^T X of the target outputs Y on those inputs
    damping: float,
    strength: float = 1.0,
) -> Tensor:
    """The weight whose output on the quantized inputs comes closest to Y, (N, K) float32.

    argmin over V of ||Y - X V^T||**2 + ridge * ||V - W||**2 with ridge = damping * mean diagonal,
    which is W + (Y^T X - W X^T X) (X^T X + ridge)^-1; `strength` scales that correction. Rounding
    it by GPTQ then minimizes ||Y - X Q^T|| instead of ||X W^T - X Q^T||: the layer also makes up
    for what quantized inputs and earlier layers have lost.

    Source: the aim of GPTAQ (Li et al., ICML 2025), asymmetric calibration; solved here at once by
    least squares.
    """
    moment = second_moment.double()
    ridge = damping * moment.diagonal().mean()
    damped = moment + torch.diag(ridge.expand(moment.shape[0]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        raise QuantizationError(
            f"second moments ({moment.shape[0]} x {moment.shape[0]}) are not positive definite "
            f"at damping {damping}: the leading minor of order {failed.item()} fails"
        )
    missing = target_moment.double() - weight.double() @ moment
    correction = torch.cholesky_solve(missing.t(), factor).t()
    return weight.float() + strength * correction.float()


def round_columns(
    columns: Tensor,  # (C, N) float32, updated in place; columns of the weight as rows
    steps: Tensor,  # (C, N) float32, the scale of every weight
    factor: Tensor,  # (C, C) float32, the block of `inverse_factor` on these columns
    formats: Sequence[Format],  # C of them
) -> tuple[Tensor, Tensor]:
    """GPTQ within a block: round column after column, each error pushed onto those after it.

    Returns:
        codes (C, N) float32, and errors (C, N) float32 that columns after the block must make up
        for: minus `factor`'s rows times these.
    """
    errors, codes = torch.empty_like(columns), torch.empty_like(columns)
    for j, fmt in enumerate(formats):
        codes[j] = fmt.round(columns[j] / steps[j])
        errors[j] = (columns[j] - codes[j] * steps[j]) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
    return codes, errors


RoundColumns = Callable[
    [Tensor, Tensor, Tensor, Sequence[Format]],
    tuple[Tensor, Tensor],
]
"""`round_columns`, or a kernel that does the same."""

BLOCK = 128
"""Columns that are rounded before their errors reach those after them, in one product."""


def gptq(
    weight: Tensor,  # (N, K) reordered
    layout: GroupLayout,
    options: RoundingOptions,
    second_moment: Tensor,  # (K, K) float32, X^T X of the reordered, quantized inputs
    round_block: RoundColumns = round_columns,
) -> RoundedWeight:
    """Round column by column, pushing each column's error onto the columns still to come.

    In stored order the scale of a group is fixed when its first column is reached, from the weights
    as they are then, and channels go from least to most important, so that the INT8 outlier
    channels, last, absorb what the INT4 ones cannot hold. With `column_order` "important_first" all
    scales are fixed at the start and channels go by descending second moment, across groups.

    Raises:
        QuantizationError: the second moments cannot be inverted.

    Source: GPTQ (Frantar et al., ICLR 2023), with the order of Atom (Zhao et al., MLSys 2024).
    """
    importance = second_moment.diagonal()
    groups = _group_columns(layout)
    formats = options.formats(layout)
    scales = torch.empty(
        weight.shape[0], layout.num_scales, dtype=torch.float16, device=weight.device
    )

    row_scales = options.find_row_scales(weight, layout, second_moment)

    def fix_scale(group: int, source: Tensor) -> None:
        scales[:, group] = options.group_scales(
            source, groups[group], group >= layout.num_normal_groups, second_moment, row_scales
        )

    if options.column_order == "stored":
        visited = None
        blocks = [
            (group, range(start, min(start + BLOCK, columns.stop)))
            for group, columns in enumerate(groups)
            for start in range(columns.start, columns.stop, BLOCK)
        ]
        factor = inverse_factor(second_moment, options.damping)
        work = weight.float().clone()
    else:
        visited = importance.argsort(descending=True, stable=True)
        blocks = [
            (-1, range(start, min(start + BLOCK, layout.channels)))
            for start in range(0, layout.channels, BLOCK)
        ]
        factor = inverse_factor(second_moment[visited][:, visited], options.damping)
        for group in range(layout.num_scales):
            fix_scale(group, weight.float())
        work = weight.float()[:, visited]
        every_step = expand_scales(scales, layout)[:, visited]
        formats = [formats[channel] for channel in visited.tolist()]

    values = torch.empty_like(work)
    for group, block in blocks:
        columns = slice(block.start, block.stop)
        if visited is None:
            if block.start == groups[group].start:
                fix_scale(group, work)
            steps = scales[:, group].float().expand(len(block), -1)
        else:
            steps = every_step[:, columns].t().contiguous()
        # Columns as rows: rounding touches one column at a time, and rows are contiguous.
        codes, errors = round_block(
            work[:, columns].t().contiguous(),
            steps,
            factor[columns, columns],
            formats[columns],
        )
        values[:, columns] = codes.t()
        work[:, block.stop :].addmm_(errors.t(), factor[columns, block.stop :], alpha=-1.0)
    if visited is not None:
        values = values[:, inverse_order(visited)]
    return RoundedWeight(values, scales, layout)


def _group_columns(layout: GroupLayout) -> list[slice]:
    """Columns of each group."""
    ends = list(accumulate(layout.group_sizes))
    return [slice(end - size, end) for end, size in zip(ends, layout.group_sizes, strict=True)]
