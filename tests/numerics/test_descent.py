"""Coordinate descent on codes: never worse, and in the end no single code could be better."""

from itertools import pairwise

import pytest
import torch

from quatom.numerics.descent import coordinate_descent
from quatom.numerics.groups import expand_scales
from quatom.numerics.rounding import gptq, round_to_nearest
from tests.numerics.test_rounding import LAYOUTS, OPTIONS, problem

DAMPING = 0.01


def damped(moment):
    return moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(48)


def cost(weight, rounded, moment):
    error = rounded.dequantize().double() - weight
    return ((error @ damped(moment)) * error).sum()


def refine(weight, rounded, options, moment, sweeps):
    formats = options.formats(rounded.layout)
    return coordinate_descent(weight, rounded, formats, moment, DAMPING, sweeps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", ["int4", "clipped, rows share", "e2m1, float16 outliers"])
@pytest.mark.parametrize("start", [gptq, round_to_nearest])
def test_sweeps_lower_the_error_and_keep_the_scales(layout, options, start, monkeypatch):
    # Two blocks and a part of one: what a block moved reaches the others.
    monkeypatch.setattr("quatom.numerics.descent.BLOCK", 20)
    weight, _, moment = problem()
    layout, options = LAYOUTS[layout], OPTIONS[options]
    rounded = start(weight, layout, options, moment)
    costs = [cost(weight, rounded, moment)]
    for sweeps in (1, 2, 3):
        refined = refine(weight, rounded, options, moment, sweeps)
        assert torch.equal(refined.scales, rounded.scales)
        costs.append(cost(weight, refined, moment))
    # Sums of float32 move a code on a near tie, which changes the error by a rounding of itself.
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(costs)), costs
    assert costs[1] < costs[0]


def test_in_the_end_no_code_can_be_moved_with_profit():
    weight, _, moment = problem()
    layout, options = LAYOUTS["groups, a short one, outliers"], OPTIONS["int4"]
    rounded = refine(weight, gptq(weight, layout, options, moment), options, moment, 50)
    least, steps = cost(weight, rounded, moment), expand_scales(rounded.scales, layout)
    error = rounded.dequantize().double() - weight
    hessian = damped(moment)
    for move in (-1.0, 1.0):
        # Every code alone one step up or down, in float64: the change of the whole error.
        change = 2 * move * steps * (error @ hessian) + steps.double() ** 2 * hessian.diagonal()
        values = rounded.values + move
        low = torch.where(torch.arange(48) < 40, -8, -128)
        inside = (values >= low) & (values <= -1 - low)
        # A tie within float32's rounding of the slope, some 48 * 2**-24 of it, may stay.
        assert (change[inside] >= -1e-6 * least).all()


def test_inputs_that_are_all_zero_change_nothing():
    weight, _, moment = problem()
    layout, options = LAYOUTS["whole rows"], OPTIONS["int4"]
    rounded = round_to_nearest(weight, layout, options)
    refined = refine(weight, rounded, options, torch.zeros_like(moment), 2)
    assert torch.equal(refined.values, rounded.values)
