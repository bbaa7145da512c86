"""The kernel of coordinate descent: the loop's codes."""

import pytest
import torch

from quatom.numerics.descent import coordinate_descent, visit_columns
from quatom.numerics.formats import get_format
from quatom.numerics.rounding import gptq
from quatom.quantize.descent_triton import visit_columns_triton
from quatom.quantize.loops import choose_visit_columns
from tests.numerics.test_rounding import LAYOUTS, OPTIONS, problem


@pytest.mark.parametrize(("count", "rows"), [(64, 33), (40, 5), (1, 1)])
def test_the_kernel_gives_the_loops_codes(count, rows, device):
    weight, _, moment = problem(channels=count, rows=rows, seed=count)
    formats = [get_format("int8" if j % 5 == 4 else "int4") for j in range(count)]
    generator = torch.Generator().manual_seed(1)
    steps = (torch.rand(count, rows, generator=generator) + 0.5) / 7
    values = torch.randint(-8, 8, (count, rows), generator=generator).float()
    slope = moment @ (values * steps - weight.t())
    operands = [x.to(device) for x in (values, steps, slope, moment)]
    want = visit_columns(*operands, formats)
    # A fused multiply-add may move a code over a tie, which these seeds do not have.
    assert torch.equal(visit_columns_triton(*operands, formats), want)
    assert not torch.equal(want, operands[0])


def test_descent_through_the_kernel(device):
    weight, _, moment = problem()
    layout, options = LAYOUTS["groups, a short one, outliers"], OPTIONS["int4"]
    rounded = gptq(weight, layout, options, moment)
    on_device = type(rounded)(rounded.values.to(device), rounded.scales.to(device), layout)
    formats = options.formats(layout)
    got, want = (
        coordinate_descent(weight.to(device), on_device, formats, moment.to(device), 0.01, 2, visit)
        for visit in (visit_columns_triton, visit_columns)
    )
    assert torch.equal(got.values, want.values)


def test_formats_without_a_kernel_take_the_loop():
    e2m1, int4 = get_format("e2m1"), get_format("int4")
    assert choose_visit_columns(torch.device("cuda"), [int4, e2m1]) is visit_columns
    assert choose_visit_columns(torch.device("cuda"), [int4]) is visit_columns_triton
    assert choose_visit_columns(torch.device("cpu"), [int4]) is visit_columns
