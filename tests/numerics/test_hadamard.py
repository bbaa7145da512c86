"""Hadamard rotations: orthogonal, their own inverse, confined to groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout
from quatom.numerics.hadamard import (
    hadamard,
    hadamard_block,
    rotate_groups,
    rotate_heads,
    rotate_last_axis,
)

LAYOUTS = [
    GroupLayout(normal=256, group_size=128, outliers=64),
    GroupLayout(normal=128 + 96, group_size=128, outliers=32),  # a short group of 3 x 32
    GroupLayout(normal=96, group_size=96),
    GroupLayout(normal=64, group_size=128, outliers=32),  # only a short group
]


def test_the_smallest_matrices_are_known():
    root = 2**-0.5
    assert torch.equal(hadamard(1), torch.ones(1, 1))
    torch.testing.assert_close(hadamard(2), torch.tensor([[root, root], [root, -root]]))
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert torch.equal(hadamard(4), signs / 2)


@pytest.mark.parametrize("size", [2, 32, 128])
def test_it_is_symmetric_and_its_own_inverse(size):
    matrix = hadamard(size).double()
    assert torch.equal(matrix, matrix.t())
    # Entries are +-1/sqrt(size) in float32: products sum to 1 within size * 2**-24.
    torch.testing.assert_close(matrix @ matrix, torch.eye(size).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0, 3, 96])
def test_other_sizes_are_refused(size):
    with pytest.raises(ShapeError, match=f"power of two, got {size}"):
        hadamard(size)


@pytest.mark.parametrize(("group", "block"), [(128, 128), (96, 32), (32, 32), (160, 32)])
def test_a_block_is_the_largest_power_of_two_in_a_group(group, block):
    assert hadamard_block(group) == block


@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_heads_of_a_power_of_two_are_rotated_by_the_whole_matrix(size):
    torch.testing.assert_close(rotate_heads(torch.eye(size)), hadamard(size))


@pytest.mark.parametrize(("size", "block"), [(80, 16), (96, 32), (100, 4), (112, 16), (192, 64)])
def test_heads_of_other_sizes_are_rotated_block_by_block(size, block):
    matrix = rotate_heads(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.t())
    assert ((matrix != 0).sum(dim=1) == block).all()
    assert torch.equal(matrix.abs().amax(dim=1), torch.full((size,), 1.0) * block**-0.5)
    # Neighbours of the first half and their partners in the other.
    first = torch.arange(block // 2)
    assert matrix[0].nonzero().flatten().tolist() == [*first, *(first + size // 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_do_not_mix_and_outliers_stay(layout):
    x = torch.randn(3, layout.channels)
    rotated = rotate_groups(x, layout)
    assert torch.equal(rotated[:, layout.normal :], x[:, layout.normal :])
    start = 0
    for size in layout.group_sizes[: layout.num_normal_groups]:
        part = slice(start, start + size)
        alone = rotate_last_axis(x[:, part], hadamard_block(size))
        torch.testing.assert_close(rotated[:, part], alone, atol=1e-6, rtol=1e-6)
        start += size


@given(seed=st.integers(0, 2**16), which=st.integers(0, len(LAYOUTS) - 1))
@settings(deadline=None, max_examples=20)
def test_products_and_rows_survive(seed, which):
    torch.manual_seed(seed)
    layout = LAYOUTS[which]
    x, w = torch.randn(2, layout.channels), torch.randn(4, layout.channels)
    x_rotated, w_rotated = rotate_groups(x, layout), rotate_groups(w, layout)
    # float32 sums of at most 320 products of numbers around 1.
    torch.testing.assert_close(x_rotated @ w_rotated.t(), x @ w.t(), atol=2e-4, rtol=0)
    torch.testing.assert_close(rotate_groups(x_rotated, layout), x, atol=1e-5, rtol=0)
