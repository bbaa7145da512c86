"""Weights to codes: round to nearest, or GPTQ's rounding with error feedback.

Both take the weight with its input channels already in reordered position and return codes and
scales in the layout that a checkpoint stores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quatom.errors import QuantizationError
from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import Format
from quatom.numerics.groups import GroupLayout, expand_scales


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """How weights of one linear are rounded; fields as in `quatom.recipe.WeightSpec`."""

    normal: Format
    outlier: Format
    clip_ratio: float = 1.0
    clip_search: str = "none"
    rows_per_scale: int = 1
    damping: float = 0.01

    def group_scales(
        self, weight: Tensor, is_outlier: bool, importance: Tensor | None
    ) -> Tensor:  # (N, C) -> (N,) float16
        """Scale of one group for every row. Outliers have a scale a row and are not clipped."""
        if is_outlier:
            if not self.outlier.is_quantized:
                return torch.ones(weight.shape[0], dtype=torch.float16, device=weight.device)
            return weight_scales(weight, self.outlier)
        return weight_scales(
            weight,
            self.normal,
            clip_ratio=self.clip_ratio,
            rows_per_scale=self.rows_per_scale,
            ratios=() if self.clip_search == "none" else SEARCH_RATIOS,
            importance=importance if self.clip_search == "output" else None,
        )


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
    importance: Tensor | None = None,  # (K,) second moment of each channel
) -> RoundedWeight:
    """Round every weight alone."""
    scales, values = [], []
    start = 0
    for group, size in enumerate(layout.group_sizes):
        columns = slice(start, start + size)
        part = weight[:, columns].float()
        is_outlier = group >= layout.num_normal_groups
        scale = options.group_scales(
            part, is_outlier, None if importance is None else importance[columns]
        )
        fmt = options.outlier if is_outlier else options.normal
        values.append(fmt.round(part / scale.float().unsqueeze(1)))
        scales.append(scale)
        start += size
    return RoundedWeight(torch.cat(values, dim=1), torch.stack(scales, dim=1), layout)


def inverse_factor(
    second_moment: Tensor,  # (K, K)
    damping: float,
) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment, (K, K) float32.

    Raises:
        QuantizationError: the damped matrix is not positive definite, or not finite.
    """
    moment = second_moment.double()
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise QuantizationError("second moments of the inputs are not finite")
    # Channels that are always zero: any value does, so let them be their own unit problem.
    dead = diagonal == 0
    moment = moment + torch.diag(damping * mean + dead.double() * max(mean.item(), 1.0))
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.item():
        raise QuantizationError(
            f"second moments ({moment.shape[0]} x {moment.shape[0]}) are not positive definite "
            f"at damping {damping}: the leading minor of order {failed.item()} fails"
        )
    inverse = torch.cholesky_inverse(factor)
    factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed.item() or not torch.isfinite(factor).all():
        raise QuantizationError(
            f"the inverse of the second moments ({moment.shape[0]} x {moment.shape[0]}) is not "
            f"positive definite at damping {damping}"
        )
    return factor.float()


def shift_to_target(
    weight: Tensor,  # (N, K) reordered
    second_moment: Tensor,  # (K, K) X^T X of the quantized inputs
    target_moment: Tensor,  # (N, K) Y^T X of the outputs Y wanted on those inputs
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


def gptq(
    weight: Tensor,  # (N, K) reordered
    layout: GroupLayout,
    options: RoundingOptions,
    second_moment: Tensor,  # (K, K) float32, X^T X of the reordered, quantized inputs
) -> RoundedWeight:
    """Round column by column, pushing each column's error onto the columns still to come.

    The scale of a group is fixed when its first column is reached, from the weights as they are
    then. Channels are visited in stored order: from least to most important, so that the INT8
    outlier channels, last, absorb what the INT4 ones cannot hold.

    Raises:
        QuantizationError: the second moments cannot be inverted.

    Source: GPTQ (Frantar et al., ICLR 2023), with the order of Atom (Zhao et al., MLSys 2024).
    """
    factor = inverse_factor(second_moment, options.damping)
    importance = second_moment.diagonal()
    work = weight.float().clone()
    values = torch.empty_like(work)
    scales = torch.empty(work.shape[0], layout.num_scales, dtype=torch.float16, device=work.device)
    start = 0
    for group, size in enumerate(layout.group_sizes):
        is_outlier = group >= layout.num_normal_groups
        fmt = options.outlier if is_outlier else options.normal
        scale = options.group_scales(
            work[:, start : start + size], is_outlier, importance[start : start + size]
        )
        scales[:, group] = scale
        # Columns as rows: the loop below touches one column at a time, and rows are contiguous.
        columns = work[:, start : start + size].t().contiguous()  # (C, N)
        step = scale.float()
        local = factor[start : start + size, start : start + size]
        errors = torch.empty_like(columns)
        codes = torch.empty_like(columns)
        for j in range(size):
            column = columns[j]
            codes[j] = fmt.round(column / step)
            errors[j] = (column - codes[j] * step) / local[j, j]
            if j + 1 < size:
                columns[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1.0)
        values[:, start : start + size] = codes.t()
        if start + size < work.shape[1]:
            work[:, start + size :].addmm_(
                errors.t(), factor[start : start + size, start + size :], alpha=-1.0
            )
        start += size
    return RoundedWeight(values, scales, layout)
