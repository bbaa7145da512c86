"""The kernel of the clip search finds scales as good as those of the torch operations."""

import pytest
import torch

from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import get_format
from quatom.numerics.multiples import find_row_scales, nearest_multiple
from quatom.quantize.clip_search_triton import weight_scales_triton


def squared_error(weight, scales, fmt, importance):
    step = scales.double().unsqueeze(1)
    missing = fmt.round((weight.double() / step).float()) * step - weight
    return (missing.square() * importance).sum(dim=1)


# Rows per scale and multiples are compiled in, the rest are operands: every pair of the former, at
# sizes below, at and beyond a program's.
@pytest.mark.parametrize(
    ("scale_format", "fmt", "weighted", "rows", "columns", "rows_per_scale"),
    [
        ("float16", "int4", False, 1, 1, 1),
        ("multiples", "int3", True, 1, 1, 3),
        ("float16", "int3", True, 7, 40, 1),
        ("float16", "int3", False, 7, 40, 2),
        ("float16", "int4", True, 7, 40, 3),
        ("multiples", "int4", True, 7, 40, 1),
        ("multiples", "int3", False, 7, 40, 2),
        ("multiples", "int4", False, 7, 40, 3),
        ("float16", "int4", True, 16, 64, 1),
        ("multiples", "int4", True, 33, 128, 2),
    ],
)
def test_scales_cost_what_the_reference_ones_cost(
    rows, columns, rows_per_scale, weighted, fmt, scale_format, device
):
    generator = torch.Generator().manual_seed(rows + columns)
    # A part of a wider weight, as GPTQ hands groups over; heavy tails make clipping pay.
    weight = torch.randn(rows, columns + 8, generator=generator).pow(3)[:, 4 : columns + 4]
    importance = torch.rand(columns, generator=generator) if weighted else None
    fmt = get_format(fmt)
    options = {"clip_ratio": 0.9, "rows_per_scale": rows_per_scale, "ratios": SEARCH_RATIOS}
    row_scales = None
    if scale_format == "multiples":
        row_scales = find_row_scales(weight_scales(weight, fmt, **options)[:, None], 13)
    want = weight_scales(weight, fmt, importance=importance, row_scales=row_scales, **options)
    got = weight_scales_triton(
        weight.to(device),
        fmt,
        importance=None if importance is None else importance.to(device),
        row_scales=None if row_scales is None else row_scales.to(device),
        **options,
    ).cpu()
    assert got.dtype is torch.float16
    assert got.shape == (rows,)
    if row_scales is not None:
        assert torch.equal(nearest_multiple(got, row_scales), got.float())
    for first in range(0, rows, rows_per_scale):
        assert (got[first : first + rows_per_scale] == got[first]).all()
    weights = torch.ones(columns) if importance is None else importance
    errors = [
        torch.stack([e.sum() for e in squared_error(weight, s, fmt, weights).split(rows_per_scale)])
        for s in (got, want)
    ]
    # The best of 25 candidates up to sums of 128 float32 squares: 128 * 2**-24 relatively.
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert (got == want).float().mean() > 0.9


def test_without_a_search_or_for_other_formats_it_is_the_reference(device):
    weight = torch.randn(8, 32, device=device)
    for fmt, ratios in ((get_format("int4"), ()), (get_format("e2m1"), SEARCH_RATIOS)):
        options = {"clip_ratio": 0.85, "rows_per_scale": 2, "ratios": ratios}
        assert torch.equal(
            weight_scales_triton(weight, fmt, **options), weight_scales(weight, fmt, **options)
        )


def test_a_group_of_zeros_has_the_smallest_scale(device):
    scales = weight_scales_triton(
        torch.zeros(4, 32, device=device), get_format("int4"), ratios=SEARCH_RATIOS
    )
    assert (scales == 2.0**-14).all()
