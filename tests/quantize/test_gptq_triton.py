"""GPTQ's kernel: the loop's codes, and the textbook algorithm through it."""

import pytest
import torch

from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.numerics.rounding import (
    RoundingOptions,
    gptq,
    inverse_factor,
    round_columns,
)
from quatom.quantize.gptq_triton import round_columns_triton
from quatom.quantize.loops import choose_round_columns
from tests.numerics.test_rounding import LAYOUTS, OPTIONS, problem, textbook_check

INTEGERS = ("int4", "clipped, rows share", "searched")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", INTEGERS)
def test_the_kernel_is_the_textbook_algorithm(layout, options, device):
    weight, _, moment = problem()
    rounded = gptq(
        weight.to(device),
        LAYOUTS[layout],
        OPTIONS[options],
        moment.to(device),
        round_columns_triton,
    )
    codes = type(rounded)(rounded.values.cpu(), rounded.scales.cpu(), rounded.layout)
    textbook_check(weight, LAYOUTS[layout], OPTIONS[options], moment, codes)


@pytest.mark.parametrize(("count", "rows"), [(128, 5), (64, 17), (40, 5), (1, 1)])
def test_the_kernel_gives_the_loops_codes_and_errors(count, rows, device):
    weight, _, moment = problem(channels=count, rows=rows, seed=count)
    columns = weight.t().contiguous().to(device)
    steps = weight.abs().amax(dim=1).expand(count, -1).to(device) / 7
    formats = [get_format("int8" if j % 5 == 4 else "int4") for j in range(count)]
    factor = inverse_factor(moment, 0.01).to(device)
    want_codes, want_errors = round_columns(columns.clone(), steps, factor, formats)
    codes, errors = round_columns_triton(columns.clone(), steps, factor, formats)
    # A fused multiply-add may move a weight over a tie, which these seeds do not have.
    assert torch.equal(codes, want_codes)
    # Each of up to 128 updates rounds by 2**-24 of values up to about 8 steps.
    torch.testing.assert_close(errors, want_errors, rtol=1e-4, atol=1e-4)


def test_rows_that_pad_a_program_do_not_matter(device):
    weight, _, moment = problem(rows=17)
    layout = GroupLayout(normal=48, group_size=16)
    options = RoundingOptions(normal=get_format("int4"), outlier=get_format("int8"))
    both = [
        gptq(weight[:rows].to(device), layout, options, moment.to(device), round_columns_triton)
        for rows in (17, 16)
    ]
    assert torch.equal(both[0].values[:16], both[1].values)


def test_a_cpu_and_formats_of_other_values_take_the_loop():
    integers = (get_format("int4"), get_format("int8"))
    assert choose_round_columns(torch.device("cpu"), integers) is round_columns
    assert choose_round_columns(torch.device("cuda"), integers) is round_columns_triton
    assert choose_round_columns(torch.device("cuda"), (get_format("e2m1"),)) is round_columns
    assert (
        choose_round_columns(torch.device("cuda"), (get_format("int4"), get_format("float16")))
        is round_columns
    )
