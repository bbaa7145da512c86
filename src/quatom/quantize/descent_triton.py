# mypy: ignore-errors
"""`visit_columns` of coordinate descent as one Triton kernel, like `gptq_triton`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.formats import Format
from quatom.ops.triton_quantize import round_half_even

ROWS = 16
"""Rows of the weight per program, whose slopes stay in registers."""


@triton.jit
def _visit_kernel(
    values_ptr,  # (C, N) float32
    steps_ptr,  # (C, N) float32
    slope_ptr,  # (C, N) float32
    moment_ptr,  # (C, C) float32
    largest_ptr,  # (C,) float32
    codes_ptr,  # (C, N) float32
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least C
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_row = rows < num_rows
    place = tl.arange(0, WIDTH)
    slopes = tl.load(
        slope_ptr + place[None, :] * num_rows + rows[:, None],
        mask=real_row[:, None] & (place < num_columns)[None, :],
        other=0.0,
    )
    for j in range(num_columns):
        slope = tl.sum(tl.where((place == j)[None, :], slopes, 0.0), axis=1)
        value = tl.load(values_ptr + j * num_rows + rows, mask=real_row, other=0.0)
        step = tl.load(steps_ptr + j * num_rows + rows, mask=real_row, other=1.0)
        largest = tl.load(largest_ptr + j)
        curvature = tl.load(moment_ptr + j * num_columns + j)
        wanted = value - tl.div_rn(slope, curvature * step)
        # Integers limit before they round, so that the addend below never meets a huge number.
        limited = tl.minimum(tl.maximum(wanted, -largest - 1.0), largest)
        code = round_half_even(limited)
        tl.store(codes_ptr + j * num_rows + rows, code, mask=real_row)
        coupling = tl.load(
            moment_ptr + j * num_columns + place,
            mask=(place > j) & (place < num_columns),
            other=0.0,
        )
        slopes += ((code - value) * step)[:, None] * coupling[None, :]


def visit_columns_triton(
    values: Tensor,  # (C, N) float32
    steps: Tensor,  # (C, N) float32
    slope: Tensor,  # (C, N) float32
    moment: Tensor,  # (C, C) float32
    formats: Sequence[Format],
) -> Tensor:  # (C, N) float32
    """See `visit_columns`; integer formats. CUDA, or the CPU under TRITON_INTERPRET=1.

    A multiply and an add may be fused, so that a code next to a tie can come out differently.
    """
    count, rows = values.shape
    codes = torch.empty_like(values)
    largest = torch.tensor([fmt.largest for fmt in formats], device=values.device)
    operands = (x.contiguous() for x in (values, steps, slope, moment))
    _visit_kernel[(triton.cdiv(rows, ROWS),)](
        *operands,
        largest,
        codes,
        rows,
        count,
        ROWS=ROWS,
        WIDTH=triton.next_power_of_2(count),
        num_warps=4,
    )
    return codes
