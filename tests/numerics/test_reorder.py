"""Channel orders: ascending, outliers last, block by block, sliceable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.errors import ShapeError
from quatom.numerics.reorder import (
    channel_order,
    check_order,
    inverse_order,
    sliceable_positions,
)


def test_one_block_sorts_all_channels():
    scores = torch.tensor([5.0, 1.0, 9.0, 3.0])
    assert channel_order(scores, 1).tolist() == [1, 3, 0, 2]


def test_equal_scores_keep_their_place():
    assert channel_order(torch.tensor([0.0, 7.0] + [0.0] * 30), 0).tolist() == [
        0,
        *range(2, 32),
        1,
    ]


def test_two_blocks_have_outliers_of_their_own_behind_all_normal_channels():
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0, 40.0, 10.0, 30.0, 20.0])
    # Block 0 is channels 0-3, block 1 channels 4-7; the largest of each is its outlier.
    assert channel_order(scores, 1, blocks=2).tolist() == [1, 3, 2, 5, 7, 6, 0, 4]


def test_sliceable_form_gives_each_slice_its_normal_channels_then_its_outliers():
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0, 40.0, 10.0, 30.0, 20.0])
    order = channel_order(scores, 1, blocks=2)
    assert order[sliceable_positions(8, 1, 2)].tolist() == [1, 3, 2, 0, 5, 7, 6, 4]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    blocks=st.sampled_from([1, 2, 4]),
    width=st.integers(2, 12),
    data=st.data(),
)
def test_orders_are_permutations_and_slices_stay_in_their_block(seed, blocks, width, data):
    outliers = data.draw(st.integers(0, width - 1))
    scores = torch.randint(0, 5, (blocks * width,), generator=torch.Generator().manual_seed(seed))
    order = channel_order(scores.float(), outliers, blocks)
    check_order(order, blocks * width)
    assert torch.equal(order[inverse_order(order)], torch.arange(blocks * width))
    slices = order[sliceable_positions(blocks * width, outliers, blocks)].view(blocks, width)
    for block, channels in enumerate(slices):
        assert set(channels.tolist()) == set(range(block * width, (block + 1) * width))
        assert (scores[channels].diff() >= 0).all()


@pytest.mark.parametrize(("channels", "outliers", "blocks"), [(10, 2, 3), (8, 4, 2), (8, 8, 1)])
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(channels, outliers, blocks):
    with pytest.raises(ShapeError, match=f"{channels} channels .* {blocks} .* {outliers}"):
        channel_order(torch.zeros(channels), outliers, blocks)


@pytest.mark.parametrize("bad", [[0, 0, 1], [0, 1], [0, 1, 3], [-1, 0, 1]])
def test_what_is_no_permutation_is_refused(bad):
    with pytest.raises(ShapeError, match="no permutation of 3"):
        check_order(torch.tensor(bad), 3)
