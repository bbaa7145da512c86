"""Group quantization: the rules by hand-computed rows, then properties."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.errors import ShapeError
from quatom.numerics.formats import get_format
from quatom.numerics.groups import (
    MIN_SCALE,
    GroupLayout,
    dequantize_groups,
    expand_scales,
    quantize_groups,
    symmetric_scale,
)

INT4, INT8 = get_format("int4"), get_format("int8")
# Two whole groups of 4, a short one of 2, then two outlier groups of 2.
LAYOUT = GroupLayout(normal=10, group_size=4, outliers=4, outlier_blocks=2)


def test_layout_counts():
    assert LAYOUT.channels == 14
    assert LAYOUT.group_sizes == (4, 4, 2, 2, 2)
    assert (LAYOUT.num_normal_groups, LAYOUT.num_outlier_groups, LAYOUT.num_scales) == (3, 2, 5)
    plain = GroupLayout(normal=8, group_size=8)
    assert (plain.group_sizes, plain.num_scales) == ((8,), 1)
    llama = GroupLayout(normal=4096 - 128, group_size=128, outliers=128)
    assert llama.num_scales == 32


# fmt: off
HAND_ROWS = {
    # Group maxima 7, 14 and 3.5 give steps 1, 2 and 0.5; outliers 127 and 254 steps 1 and 2.
    "each group has its own step": (
        1.0,
        [7, 0.5, 1.5, 2.5, 14, 1, 3, -5, 3.5, -0.25, 127, 0.5, 254, -3],
        [7, 0, 2, 2, 7, 0, 2, -2, 7, 0, 127, 0, 127, -2],
        [1.0, 2.0, 0.5, 1.0, 2.0],
    ),
    # 0.5 * 14 / 7 = 1: 14 and 9 saturate at 7, -14 at -8; outliers keep their whole range.
    "clipping is two's complement and spares outliers": (
        0.5,
        [14, -14, 9, -7.6, 0, 0, 0, 14, 14, -14, 127, -127, 254, 1],
        [7, -8, 7, -8, 0, 0, 0, 7, 7, -8, 127, -127, 127, 0],
        [1.0, 1.0, 1.0, 1.0, 2.0],
    ),
    # 7.00244 / 7 = 1.00035 is stored as 1.0: 2.5005 is 2.49963 exact steps (code 2), but 2.5005
    # stored ones (code 3).
    "the stored step divides": (
        1.0,
        [7.00244140625, 2.5005, 0, 0, 7, 0, 0, 0, 7, 0, 127, 0, 127, 0],
        [7, 3, 0, 0, 7, 0, 0, 0, 7, 0, 127, 0, 127, 0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
    ),
    # 91.5 / 61 is 1.5 and goes to 2; times the rounded 1 / 61 it is just below and would go to 1.
    "it divides, its reciprocal does not multiply": (
        1.0,
        [427, 91.5, -91.5, 0, 7, 0, 0, 0, 7, 0, 127, 0, 127, 0],
        [7, 2, -2, 0, 7, 0, 0, 0, 7, 0, 127, 0, 127, 0],
        [61.0, 1.0, 1.0, 1.0, 1.0],
    ),
    # Below 7 * 2**-14 the step stays 2**-14, and the codes shrink instead.
    "the step has a floor": (
        1.0,
        [2.0**-14, -(2.0**-13), 2.0**-16, 0, 1e-30, 0, 0, 0, 0, 0, 2.0**-14, 0, 0, 0],
        [1, -2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [MIN_SCALE] * 5,
    ),
}
# fmt: on


@pytest.mark.parametrize("rule", HAND_ROWS)
def test_codes_and_scales_worked_out_by_hand(rule):
    clip_ratio, row, codes, scales = HAND_ROWS[rule]
    got, got_scales = quantize_groups(torch.tensor([row]), LAYOUT, INT4, INT8, clip_ratio)
    assert got_scales.dtype == torch.float16
    assert got_scales[0].tolist() == scales
    assert got[0].tolist() == codes


@pytest.mark.parametrize(
    ("name", "absmax", "scale"),
    [
        ("int3", 6.0, 2.0),
        ("int8", 127.0, 1.0),
        ("e2m1", 6.0, 1.0),
        ("e4m3", 448.0, 1.0),
        ("float16", 123.0, 1.0),
    ],
)
def test_the_largest_code_of_each_format_takes_the_maximum(name, absmax, scale):
    assert symmetric_scale(torch.tensor([absmax]), get_format(name)).item() == scale


def test_a_zero_row_stays_zero_and_finite():
    codes, scales = quantize_groups(torch.zeros(2, 14), LAYOUT, INT4, INT8)
    assert (codes == 0).all()
    assert (scales == MIN_SCALE).all()


def test_float16_outliers_pass_through_beside_codes():
    row = torch.randn(3, 14, generator=torch.Generator().manual_seed(0)).half().float()
    codes, scales = quantize_groups(row, LAYOUT, INT4, get_format("float16"))
    real = dequantize_groups(codes, scales, LAYOUT)
    assert torch.equal(real[:, 10:], row[:, 10:])
    assert not torch.equal(real[:, :10], row[:, :10])


def test_expanded_scales_stand_at_their_channels():
    scales = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    want = [1.0] * 4 + [2.0] * 4 + [3.0] * 2 + [4.0] * 2 + [5.0] * 2
    assert expand_scales(scales, LAYOUT)[0].tolist() == want


layouts = st.builds(
    lambda groups, size, rest, outliers, blocks: GroupLayout(
        normal=groups * size + min(rest, size - 1),
        group_size=size,
        outliers=outliers * blocks,
        outlier_blocks=blocks,
    ),
    groups=st.integers(1, 3),
    size=st.sampled_from([4, 8, 32]),
    rest=st.integers(0, 7),
    outliers=st.integers(0, 5),
    blocks=st.sampled_from([1, 2]),
)
gains = st.floats(2.0**-6, 2.0**8, width=32)


def random_rows(layout, seed, gain):
    return torch.randn(3, layout.channels, generator=torch.Generator().manual_seed(seed)) * gain


@settings(deadline=None, max_examples=50)
@given(layout=layouts, seed=st.integers(0, 2**16), gain=gains)
def test_error_is_at_most_half_a_step_without_clipping(layout, seed, gain):
    x = random_rows(layout, seed, gain)
    codes, scales = quantize_groups(x, layout, INT4, INT8)
    error = (dequantize_groups(codes, scales, layout) - x).abs()
    step = expand_scales(scales, layout)
    # The stored scale may be smaller than the exact one by 2**-11 of itself, so that the extreme
    # value overshoots the largest code (127 at most) by 127 * 2**-11 of a step.
    assert (error <= step * (0.5 + 127 * 2.0**-11)).all()


@settings(deadline=None, max_examples=50)
@given(
    layout=layouts,
    seed=st.integers(0, 2**16),
    exponent=st.integers(-3, 6),
    clip_ratio=st.sampled_from([1.0, 0.9, 0.85]),
    name=st.sampled_from(["int3", "int4", "int8", "e2m1"]),
)
def test_a_power_of_two_changes_no_code(layout, seed, exponent, clip_ratio, name):
    # Magnitudes far above 2**-14 * 2**3 * 448, so that no group meets the floor of the scale.
    x = random_rows(layout, seed, 1.0)
    x = x + torch.where(x >= 0, 1.0, -1.0)
    fmt = get_format(name)
    codes, scales = quantize_groups(x, layout, fmt, INT8, clip_ratio)
    same, larger = quantize_groups(x * 2.0**exponent, layout, fmt, INT8, clip_ratio)
    assert torch.equal(codes, same)
    assert torch.equal(scales.float() * 2.0**exponent, larger.float())


@settings(deadline=None, max_examples=30)
@given(layout=layouts, seed=st.integers(0, 2**16))
def test_groups_do_not_see_each_other(layout, seed):
    """Each group alone, as a row of its own, has the same scale and codes."""
    x = random_rows(layout, seed, 1.0)
    codes, scales = quantize_groups(x, layout, INT4, INT8)
    start = 0
    for group, size in enumerate(layout.group_sizes):
        fmt = INT8 if group >= layout.num_normal_groups else INT4
        alone = GroupLayout(normal=size, group_size=size)
        part, scale = quantize_groups(x[:, start : start + size], alone, fmt, fmt)
        assert torch.equal(codes[:, start : start + size], part)
        assert torch.equal(scales[:, group : group + 1], scale)
        start += size


@settings(deadline=None, max_examples=30)
@given(layout=layouts, seed=st.integers(0, 2**16), name=st.sampled_from(["int4", "int8", "e4m3"]))
def test_a_shared_scale_is_that_of_all_normal_channels_in_one_group(layout, seed, name):
    x, fmt = random_rows(layout, seed, 1.0), get_format(name)
    codes, scales = quantize_groups(x, layout, fmt, INT8, 0.9, scale_mode="row")
    whole = replace(layout, group_size=layout.normal)
    want_codes, want_scales = quantize_groups(x, whole, fmt, INT8, 0.9)
    assert torch.equal(codes, want_codes)
    groups = layout.num_normal_groups
    assert torch.equal(scales[:, :groups], want_scales[:, :1].expand(-1, groups))
    assert torch.equal(scales[:, groups:], want_scales[:, 1:])


@settings(deadline=None, max_examples=30)
@given(layout=layouts, seed=st.integers(0, 2**16))
def test_an_order_is_applied_before_groups_are_cut(layout, seed):
    x = random_rows(layout, seed, 1.0)
    order = torch.randperm(layout.channels, generator=torch.Generator().manual_seed(seed))
    want = quantize_groups(x[:, order], layout, INT4, INT8)
    got = quantize_groups(x, layout, INT4, INT8, order=order.int())
    assert all(map(torch.equal, got, want))


def test_errors_name_the_numbers():
    with pytest.raises(ShapeError, match=r"row has 13 channels, its layout 14"):
        quantize_groups(torch.zeros(1, 13), LAYOUT, INT4, INT8)
    with pytest.raises(ShapeError, match=r"5 outliers do not divide into 2"):
        GroupLayout(normal=8, group_size=4, outliers=5, outlier_blocks=2)
    with pytest.raises(ShapeError, match="not positive"):
        GroupLayout(normal=0, group_size=4)
