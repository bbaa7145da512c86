# mypy: ignore-errors
"""`round_columns` of GPTQ as one Triton kernel.

The loop of `quatom.numerics.rounding.round_columns` launches some eight small kernels a column,
which is most of the time that quantizing a model takes on a GPU. Rows do not depend on each other:
here a program keeps the whole block of its rows in registers and walks over its columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.numerics.formats import Format
from quatom.ops.triton_quantize import round_half_even

ROWS = 16
"""Rows a program: 16 x 128 float32 are 16 registers a thread at four warps."""


@triton.jit
def _round_columns_kernel(
    columns_ptr,  # (C, N) float32
    steps_ptr,  # (C, N) float32, column stride `step_stride`
    factor_ptr,  # (C, C) float32
    largest_ptr,  # (C,) float32
    codes_ptr,  # (C, N) float32
    errors_ptr,  # (C, N) float32
    num_rows,
    num_columns,
    step_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least C
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_row = rows < num_rows
    place = tl.arange(0, WIDTH)
    work = tl.load(
        columns_ptr + place[None, :] * num_rows + rows[:, None],
        mask=real_row[:, None] & (place < num_columns)[None, :],
        other=0.0,
    )
    for j in range(num_columns):
        column = tl.sum(tl.where((place == j)[None, :], work, 0.0), axis=1)
        step = tl.load(steps_ptr + j * step_stride + rows, mask=real_row, other=1.0)
        largest = tl.load(largest_ptr + j)
        units = tl.div_rn(column, step)
        # Integers limit before they round, so that the addend below never meets a huge number.
        limited = tl.minimum(tl.maximum(units, -largest - 1.0), largest)
        code = round_half_even(limited)
        scaled = tl.load(factor_ptr + j * num_columns + j)
        error = tl.div_rn(column - code * step, tl.zeros_like(column) + scaled)
        tl.store(codes_ptr + j * num_rows + rows, code, mask=real_row)
        tl.store(errors_ptr + j * num_rows + rows, error, mask=real_row)
        # The factor is zero left of its diagonal: columns that are done keep what they were.
        behind = tl.load(
            factor_ptr + j * num_columns + place,
            mask=(place > j) & (place < num_columns),
            other=0.0,
        )
        work -= error[:, None] * behind[None, :]


def round_columns_triton(
    columns: Tensor,  # (C, N) float32
    steps: Tensor,  # (C, N) float32
    factor: Tensor,  # (C, C) float32
    formats: Sequence[Format],
) -> tuple[Tensor, Tensor]:
    """See `round_columns`; integer formats. CUDA, or the CPU under TRITON_INTERPRET=1.

    Sums are taken in the same order; a multiply and an add may be fused, so that a code next to a
    tie can come out differently.
    """
    count, rows = columns.shape
    errors, codes = torch.empty_like(columns), torch.empty_like(columns)
    columns, factor = columns.contiguous(), factor.contiguous()
    assert steps.stride(1) == 1 or rows == 1
    largest = torch.tensor([fmt.largest for fmt in formats], device=columns.device)
    _round_columns_kernel[(triton.cdiv(rows, ROWS),)](
        columns,
        steps,
        factor,
        largest,
        codes,
        errors,
        rows,
        count,
        steps.stride(0),
        ROWS=ROWS,
        WIDTH=triton.next_power_of_2(count),
        num_warps=4,
    )
    return codes, errors
