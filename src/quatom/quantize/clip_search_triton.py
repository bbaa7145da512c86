# mypy: ignore-errors
"""The clip search of `quatom.numerics.clipping.weight_scales` as one Triton kernel.

As torch operations it passes over a group's weights some seven times for each of 25 ratios; here a
program reads the rows that share a scale once from memory and tries all ratios on them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.clipping import weight_scales
from quatom.numerics.formats import Format
from quatom.numerics.groups import MIN_SCALE
from quatom.numerics.multiples import LARGEST_MULTIPLE
from quatom.ops.triton_quantize import round_half_even

GROUPS = 4
"""Scales a program."""


@triton.jit
def _search_kernel(
    weight_ptr,  # (N, C) float32, row stride `row_stride`
    importance_ptr,  # (C,) float32
    ratios_ptr,  # (R,) float32
    row_scales_ptr,  # (ceil(N / rows_per_scale),) float32 where scales are multiples
    scales_ptr,  # (ceil(N / rows_per_scale),) float16
    num_rows,
    num_columns,
    row_stride,
    num_ratios,
    clip_ratio,
    largest,
    MIN_SCALE: tl.constexpr,
    LARGEST_MULTIPLE: tl.constexpr,  # 0: scales are no multiples
    ROWS_PER_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least C
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, WIDTH)
    inside = place < num_columns
    importance = tl.load(importance_ptr + place, mask=inside, other=0.0)
    absmax = tl.zeros([GROUPS], tl.float32)
    for r in tl.static_range(ROWS_PER_SCALE):
        row = group * ROWS_PER_SCALE + r
        w = tl.load(
            weight_ptr + row[:, None].to(tl.int64) * row_stride + place[None, :],
            mask=(row < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        absmax = tl.maximum(absmax, tl.max(tl.abs(w), axis=1))
    absmax = absmax * clip_ratio
    if LARGEST_MULTIPLE > 0:
        row_scale = tl.load(
            row_scales_ptr + group, mask=group * ROWS_PER_SCALE < num_rows, other=1.0
        )
    best = tl.zeros([GROUPS], tl.float32)
    best_error = tl.full([GROUPS], float("inf"), tl.float32)
    for i in range(num_ratios):
        ratio = tl.load(ratios_ptr + i)
        wanted = tl.div_rn(absmax * ratio, tl.zeros_like(absmax) + largest)
        step = tl.maximum(wanted, MIN_SCALE)
        if LARGEST_MULTIPLE > 0:
            multiple = round_half_even(tl.div_rn(step, row_scale))
            step = tl.minimum(tl.maximum(multiple, 1.0), LARGEST_MULTIPLE) * row_scale
        step = step.to(tl.float16).to(tl.float32)
        error = tl.zeros([GROUPS], tl.float32)
        for r in tl.static_range(ROWS_PER_SCALE):
            row = group * ROWS_PER_SCALE + r
            w = tl.load(
                weight_ptr + row[:, None].to(tl.int64) * row_stride + place[None, :],
                mask=(row < num_rows)[:, None] & inside[None, :],
                other=0.0,
            )
            units = tl.div_rn(w, tl.broadcast_to(step[:, None], w.shape))
            limited = tl.minimum(tl.maximum(units, -largest - 1.0), largest)
            code = round_half_even(limited)
            missing = code * step[:, None] - w
            error += tl.sum(missing * missing * importance[None, :], axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best = tl.where(better, step, best)
    tl.store(scales_ptr + group, best.to(tl.float16), mask=group * ROWS_PER_SCALE < num_rows)


def weight_scales_triton(
    weight: Tensor,  # (N, C)
    fmt: Format,
    *,
    clip_ratio: float = 1.0,
    rows_per_scale: int = 1,
    ratios: tuple[float, ...] = (),
    importance: Tensor | None = None,  # (C,) or (C, C)
    row_scales: Tensor | None = None,  # (N,)
) -> Tensor:  # (N,) float16
    """See `weight_scales`. CUDA, or the CPU under TRITON_INTERPRET=1.

    Errors are summed in another order, so that of two ratios equally good the other may win. A
    search over an integer format by errors of single weights is a kernel; all else goes to
    `weight_scales`.
    """
    by_matrix = importance is not None and importance.dim() == 2
    if not ratios or not fmt.is_integer or by_matrix:
        return weight_scales(
            weight,
            fmt,
            clip_ratio=clip_ratio,
            rows_per_scale=rows_per_scale,
            ratios=ratios,
            importance=importance,
            row_scales=row_scales,
        )
    weight = weight.float()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, columns = weight.shape
    count = -(-rows // rows_per_scale)
    scales = torch.empty(count, dtype=torch.float16, device=weight.device)
    _search_kernel[(triton.cdiv(count, GROUPS),)](
        weight,
        torch.ones(columns, device=weight.device)
        if importance is None
        else importance.float().contiguous(),
        torch.tensor(ratios, device=weight.device),
        scales if row_scales is None else row_scales[::rows_per_scale].contiguous(),
        scales,
        rows,
        columns,
        weight.stride(0),
        len(ratios),
        clip_ratio,
        fmt.largest,
        MIN_SCALE=MIN_SCALE,
        LARGEST_MULTIPLE=0 if row_scales is None else LARGEST_MULTIPLE,
        ROWS_PER_SCALE=rows_per_scale,
        GROUPS=GROUPS,
        WIDTH=triton.next_power_of_2(columns),
    )
    return scales.repeat_interleave(rows_per_scale, dim=0)[:rows]
