"""Scales of weight groups: constants by hand, the search against brute force."""

import pytest
import torch

from quatom.numerics.clipping import SEARCH_RATIOS, weight_scales
from quatom.numerics.formats import get_format
from quatom.numerics.groups import MIN_SCALE

INT4, INT3 = get_format("int4"), get_format("int3")


def random_group(rows=6, channels=32, seed=0):
    """Heavy tails, so that clipping pays and different rows want different ratios."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    return x * (1 + 3 * (torch.rand(rows, channels, generator=generator) > 0.95))


def test_constant_ratio_by_hand():
    weight = torch.tensor([[7.0, 1.0], [-14.0, 1.0], [0.0, 0.0]])
    assert weight_scales(weight, INT4).tolist() == [1.0, 2.0, MIN_SCALE]
    assert weight_scales(weight, INT4, clip_ratio=0.5).tolist() == [0.5, 1.0, MIN_SCALE]
    assert weight_scales(weight, INT3).dtype == torch.float16


def test_adjacent_rows_share_the_scale_of_the_larger():
    weight = torch.tensor([[7.0], [14.0], [28.0], [7.0], [3.5]])
    assert weight_scales(weight, INT4, rows_per_scale=2).tolist() == [2.0, 2.0, 4.0, 4.0, 0.5]


def test_the_candidates_begin_at_the_full_range_and_fall():
    assert SEARCH_RATIOS[0] == 1.0
    assert SEARCH_RATIOS[-1] == pytest.approx(0.4)
    assert list(SEARCH_RATIOS) == sorted(SEARCH_RATIOS, reverse=True)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("rows_per_scale", [1, 2])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.85])
def test_the_search_takes_the_least_error_of_all_candidates(importance, rows_per_scale, clip_ratio):
    weight = random_group()
    weigh = torch.rand(32, generator=torch.Generator().manual_seed(1)) ** 4 if importance else None
    got = weight_scales(
        weight,
        INT4,
        clip_ratio=clip_ratio,
        rows_per_scale=rows_per_scale,
        ratios=SEARCH_RATIOS,
        importance=weigh,
    )
    for first in range(0, 6, rows_per_scale):
        rows = weight[first : first + rows_per_scale].double()
        costs = {}
        for ratio in SEARCH_RATIOS:
            step = (rows.abs().max() * clip_ratio * ratio / 7).half()
            codes = (rows / step.double()).round().clamp(-8, 7)
            error = (codes * step.double() - rows) ** 2
            costs[step.item()] = (error * (1 if weigh is None else weigh.double())).sum().item()
        chosen = costs[got[first].item()]
        # Sums of 64 float32 squares are wrong by at most 64 * 2**-24 of themselves.
        assert chosen <= min(costs.values()) * (1 + 1e-5)
        assert (got[first : first + rows_per_scale] == got[first]).all()
    assert got.unique().numel() > 1


def test_importance_and_clipping_change_the_choice():
    """A group whose one large channel does not matter is clipped as far as possible."""
    weight = torch.cat((torch.linspace(-1, 1, 31), torch.tensor([4.0]))).unsqueeze(0)
    importance = torch.ones(32)
    importance[31] = 1e-6
    plain = weight_scales(weight, INT4, ratios=SEARCH_RATIOS)
    weighted = weight_scales(weight, INT4, ratios=SEARCH_RATIOS, importance=importance)
    assert weighted.item() == torch.tensor(4.0 * SEARCH_RATIOS[-1] / 7).half().item()
    assert weighted < plain


def test_a_group_of_zeros_has_a_finite_scale_under_search():
    assert weight_scales(torch.zeros(2, 8), INT4, ratios=SEARCH_RATIOS).tolist() == [MIN_SCALE] * 2
