"""Rounding of weights: nearest, and GPTQ against its textbook form in float64."""

import pytest
import torch

from quatom.errors import QuantizationError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout, quantize_groups
from quatom.numerics.rounding import (
    RoundingOptions,
    gptq,
    inverse_factor,
    round_to_nearest,
)

PLAIN = RoundingOptions(normal=get_format("int4"), outlier=get_format("int8"))
LAYOUTS = {
    "groups, a short one, outliers": GroupLayout(normal=40, group_size=16, outliers=8),
    "two outlier blocks": GroupLayout(normal=32, group_size=16, outliers=16, outlier_blocks=2),
    "whole rows": GroupLayout(normal=48, group_size=48),
}
OPTIONS = {
    "int4": PLAIN,
    "clipped, rows share": RoundingOptions(
        normal=get_format("int4"),
        outlier=get_format("int8"),
        clip_ratio=0.85,
        rows_per_scale=2,
        damping=0.05,
    ),
    "searched": RoundingOptions(
        normal=get_format("int3"), outlier=get_format("int8"), clip_search="output"
    ),
    "odd integers": RoundingOptions(
        normal=get_format("odd4"), outlier=get_format("int8"), clip_search="mse"
    ),
    "e2m1, float16 outliers": RoundingOptions(
        normal=get_format("e2m1"), outlier=get_format("float16")
    ),
}


def problem(channels=48, rows=12, tokens=400, seed=0):
    """Weights, and inputs whose channels are correlated and grow, as reordered ones do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator)
    gain = torch.logspace(-0.5, 1.0, channels)
    x = torch.randn(tokens, channels, generator=generator) @ mix * gain
    weight = torch.randn(rows, channels, generator=generator)
    return weight, x, x.t() @ x


def textbook_check(weight, layout, options, moment, rounded):
    """Walk GPTQ column by column in float64, inverting the remaining matrix anew each time.

    Every code must be nearest to the weight that the textbook has compensated so far. The walk
    goes on with the code found, so that one tie rounded the other way spoils no later column.
    """
    channels = weight.shape[1]
    mean = moment.double().diagonal().mean()
    hessian = moment.double() + options.damping * mean * torch.eye(channels, dtype=torch.float64)
    work = weight.double().clone()
    ties = 0
    group = start = 0
    for j in range(channels):
        if j == start + layout.group_sizes[group]:
            start += layout.group_sizes[group]
            group += 1
        is_outlier = group >= layout.num_normal_groups
        fmt = options.outlier if is_outlier else options.normal
        step = rounded.scales[:, group].double()
        if j == start:
            columns = slice(start, start + layout.group_sizes[group])
            want = options.group_scales(work.float(), columns, is_outlier, moment)
            # Compensated weights agree to about 1e-6, so a scale may round to its neighbour; a
            # searched one would change by 2.5 % on a near tie, which these seeds do not have.
            torch.testing.assert_close(rounded.scales[:, group], want, rtol=2**-10, atol=0)
        units = work[:, j] / step
        code = rounded.values[:, j].double()
        nearest = fmt.round(units.float()).double()
        off = (code != nearest).nonzero()[:, 0]
        ties += len(off)
        # Float32 weights that took up to 48 updates are wrong by some 48 * 2**-24 of magnitudes
        # up to 16 steps (127 for outliers): well below 1e-3 steps.
        worse = (units[off] - code[off]).abs() - (units[off] - nearest[off]).abs()
        assert (worse <= 2e-3).all(), (j, worse)
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = (work[:, j] - code * step) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    assert ties <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gptq_is_the_textbook_algorithm(layout, options):
    weight, _, moment = problem()
    rounded = gptq(weight, LAYOUTS[layout], OPTIONS[options], moment)
    textbook_check(weight, LAYOUTS[layout], OPTIONS[options], moment, rounded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_output_than_nearest(layout, seed):
    weight, noise, _ = problem(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # Eight directions carry most of the input, as in trained networks.
    shared = torch.randn(400, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
    x = 4 * shared + 0.3 * noise
    moment = x.t() @ x
    layout = LAYOUTS[layout]
    errors = [
        ((rounded.dequantize() - weight) @ x.t()).norm()
        for rounded in (
            gptq(weight, layout, PLAIN, moment),
            round_to_nearest(weight, layout, PLAIN),
        )
    ]
    # On such inputs GPTQ about halves the error; 0.8 leaves room for the seeds.
    assert errors[0] < 0.8 * errors[1], errors


def test_gptq_with_uncorrelated_inputs_is_nearest():
    weight, _, _ = problem()
    layout = LAYOUTS["groups, a short one, outliers"]
    got = gptq(weight, layout, PLAIN, torch.eye(48) * 3)
    want = round_to_nearest(weight, layout, PLAIN)
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.scales, want.scales)


def test_nearest_is_group_quantization_of_the_rows():
    weight, _, _ = problem()
    layout = LAYOUTS["two outlier blocks"]
    got = round_to_nearest(weight, layout, PLAIN)
    codes, scales = quantize_groups(weight, layout, PLAIN.normal, PLAIN.outlier)
    assert torch.equal(got.values, codes)
    assert torch.equal(got.scales, scales)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_outliers_have_a_scale_a_row_and_are_never_clipped(rounding):
    weight, _, moment = problem()
    options = OPTIONS["clipped, rows share"]
    layout = LAYOUTS["groups, a short one, outliers"]
    if rounding == "nearest":
        rounded = round_to_nearest(weight, layout, options)
        absmax = weight[:, 40:].abs().amax(dim=1)
        assert torch.equal(rounded.scales[:, -1], (absmax / 127).half())
    else:
        rounded = gptq(weight, layout, options, moment)
    normal, outlier = rounded.scales[:, :-1], rounded.scales[:, -1]
    assert torch.equal(normal[0::2], normal[1::2])
    assert not torch.equal(outlier[0::2], outlier[1::2])
    assert rounded.values[:, :40].abs().max() <= 8
    assert rounded.values[:, 40:].abs().amax() > 100


def test_the_searched_scale_of_gptq_weighs_with_second_moments():
    weight, _, moment = problem()
    layout = LAYOUTS["whole rows"]
    searched = gptq(weight, layout, OPTIONS["searched"], moment).scales
    want = OPTIONS["searched"].group_scales(weight, slice(48), False, moment)
    assert torch.equal(searched[:, 0], want)
    assert not torch.equal(
        want, OPTIONS["searched"].group_scales(weight, slice(48), False, torch.eye(48))
    )


def test_dead_channels_are_rounded_and_change_nothing_else():
    """A channel that is always zero has a zero row and column of second moments."""
    weight, x, _ = problem()
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[0, 5, 47]] = True
    x = x * ~dead
    layout = LAYOUTS["whole rows"]
    rounded = gptq(weight, layout, PLAIN, x.t() @ x)
    assert torch.isfinite(rounded.dequantize()).all()
    nearest = round_to_nearest(weight, layout, PLAIN)
    assert torch.equal(rounded.values[:, dead], nearest.values[:, dead])
    error = ((rounded.dequantize() - weight) @ x.t()).norm()
    assert error < ((nearest.dequantize() - weight) @ x.t()).norm()


def test_all_channels_dead_is_nearest():
    weight, _, _ = problem()
    layout = LAYOUTS["whole rows"]
    got = gptq(weight, layout, PLAIN, torch.zeros(48, 48))
    assert torch.equal(got.values, round_to_nearest(weight, layout, PLAIN).values)


def test_fewer_tokens_than_channels_works_thanks_to_damping():
    weight, x, _ = problem(tokens=5)
    rounded = gptq(weight, LAYOUTS["whole rows"], PLAIN, x.t() @ x)
    assert torch.isfinite(rounded.dequantize()).all()


@pytest.mark.parametrize("bad", ["indefinite", "nan", "overflow"])
def test_moments_that_cannot_be_inverted_are_an_error_with_the_numbers(bad):
    weight, _, moment = problem()
    if bad == "indefinite":
        moment[0, 1] = moment[1, 0] = 10 * moment[1, 1]
    elif bad == "nan":
        moment[3, 3] = torch.nan
    else:
        moment[3, 3] = torch.inf
    message = (
        r"\(48 x 48\) are not positive definite at damping 0.01"
        if bad == "indefinite"
        else ("not finite")
    )
    with pytest.raises(QuantizationError, match=message):
        gptq(weight, LAYOUTS["whole rows"], PLAIN, moment)


def test_inverse_factor_is_the_upper_factor_of_the_damped_inverse():
    _, _, moment = problem()
    factor = inverse_factor(moment, 0.01).double()
    damped = moment.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    # The factor is rounded to float32 at the end, and the product takes its error twice.
    assert torch.equal(factor, factor.triu())
    scale = torch.linalg.inv(damped).abs().max()
    assert ((factor.t() @ factor - torch.linalg.inv(damped)).abs().max() / scale) < 1e-6
