"""Scales as multiples of a row scale: exact in float16, close to the free scale, found again."""

import pytest
import torch

from quatom.errors import QuantizationError
from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.numerics.multiples import (
    find_row_scales,
    multiple_bytes,
    nearest_multiple,
    pack_multiples,
    split_multiples,
    unpack_multiples,
)
from quatom.numerics.rounding import RoundingOptions, gptq, round_to_nearest


@pytest.mark.parametrize("size", [2.0**-14, 1e-3, 0.02, 1.0, 1000.0])
def test_multiples_are_float16_numbers_and_reach_the_largest_scale(size):
    rng = torch.Generator().manual_seed(1)
    scales = (size * (1 + torch.rand(500, 7, generator=rng))).half()
    row_scales = find_row_scales(scales, 13)
    every = row_scales[:, None] * torch.arange(1, 17)
    assert torch.equal(every.half().float(), every)
    assert (every[:, 12] >= scales.float().amax(dim=1)).all()
    # 7 significant bits: rounded up by less than a 64th.
    assert (every[:, 12] <= scales.float().amax(dim=1) * (1 + 2**-6)).all()
    snapped = nearest_multiple(scales, row_scales[:, None])
    # Scales of at least half the largest one are 6.4 multiples and more: off by half a one.
    assert ((snapped - scales.float()).abs() <= scales.float() * 0.5 / 6.4).all()


def test_splitting_gives_back_the_same_scales_whatever_the_multiples():
    rng = torch.Generator().manual_seed(2)
    row_scales = torch.randint(64, 128, (300, 1), generator=rng) * 2.0**-18
    counts = torch.randint(1, 17, (300, 5), generator=rng)
    counts[0] = torch.tensor([2, 4, 8, 16, 6])  # all even: the row scale is twice as large
    scales = (row_scales * counts).half()
    found, multiples = split_multiples(scales)
    assert torch.equal(found[:, None] * multiples, scales.float())
    assert multiples.max() <= 16
    assert multiples.min() >= 1
    assert multiples[0].tolist() == [1, 2, 4, 8, 3]


def test_scales_that_are_no_multiples_are_an_error():
    with pytest.raises(QuantizationError, match=r"up to 17 of .*scale_format 'multiples'"):
        split_multiples(torch.tensor([[17.0, 1.0], [16.0, 1.0]]).half())


@pytest.mark.parametrize("rows_per_scale", [1, 2])
@pytest.mark.parametrize("ratios", [(), SEARCH_RATIOS])
def test_the_search_keeps_to_multiples_and_costs_little(rows_per_scale, ratios):
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 128, generator=rng) * torch.rand(64, 1, generator=rng)
    fmt = get_format("int4")
    options = {"ratios": ratios, "rows_per_scale": rows_per_scale}
    free = weight_scales(weight, fmt, **options).float()
    row_scales = find_row_scales(free[:, None], 13)
    scales = weight_scales(weight, fmt, row_scales=row_scales, **options).float()
    assert torch.equal(nearest_multiple(scales, row_scales), scales)

    def error(steps):
        return (fmt.round(weight / steps[:, None]) * steps[:, None] - weight).square().sum()

    assert error(scales) <= 1.1 * error(free)


@pytest.mark.parametrize("column_order", ["stored", "important_first"])
def test_rounding_writes_multiples_under_float16_outliers(column_order):
    rng = torch.Generator().manual_seed(4)
    layout = GroupLayout(96, 32, 32)
    weight = torch.randn(48, 128, generator=rng)
    weight[:, :32] *= 3.0
    inputs = torch.randn(512, 128, generator=rng)
    options = RoundingOptions(
        get_format("int4"),
        get_format("int8"),
        clip_search="mse",
        rows_per_scale=2,
        scale_format="multiples",
        column_order=column_order,
    )
    for rounded in (
        round_to_nearest(weight, layout, options),
        gptq(weight, layout, options, inputs.t() @ inputs),
    ):
        _, multiples = split_multiples(rounded.scales[:, :3])
        assert multiples.max() <= 16
        assert (rounded.dequantize() - weight).norm() / weight.norm() < 0.12
        assert torch.equal(rounded.scales[::2, :3], rounded.scales[1::2, :3])


@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (4, 1), (5, 1), (12, 2), (6, 2), (20, 4)])
def test_multiples_are_packed_and_cut_like_the_channels(groups, blocks):
    multiples = torch.randint(1, 17, (9, groups), generator=torch.Generator().manual_seed(4))
    packed = pack_multiples(multiples, blocks)
    assert packed.shape == (9, multiple_bytes(groups, blocks))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_multiples(packed, groups, blocks), multiples)
    # A tensor-parallel rank takes an equal slice of the bytes, and has an equal slice of groups.
    parts = zip(packed.chunk(blocks, dim=1), multiples.chunk(blocks, dim=1), strict=True)
    assert all(torch.equal(unpack_multiples(b, groups // blocks, 1), m) for b, m in parts)


@pytest.mark.parametrize("rows_per_scale", [1, 2])
def test_packed_scales_are_the_scales_that_were_rounded_with(rows_per_scale):
    """The smallest row scale, 2**-14 / 13, and the largest multiple are float16 numbers too."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 320, generator=rng) * torch.logspace(-7, 1, 64)[:, None]
    options = RoundingOptions(
        normal=get_format("int4"),
        outlier=get_format("int8"),
        scale_format="packed_multiples",
        rows_per_scale=rows_per_scale,
        clip_search="mse",
    )
    scales = round_to_nearest(weight, GroupLayout(normal=320, group_size=64), options).scales
    row_scales, multiples = split_multiples(scales)
    assert torch.equal(row_scales.half().float(), row_scales)
    unpacked = unpack_multiples(pack_multiples(multiples, 1), 5, 1)
    assert torch.equal((row_scales[:, None] * unpacked).half(), scales)
