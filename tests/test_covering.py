"""covering: fewer points than the grid, and no pair or triple of values is missing."""

from itertools import combinations, product

import pytest

from tests.covering import covering


@pytest.mark.parametrize(
    ("sizes", "strength", "most"),
    [((5, 9, 3), 2, 50), ((2, 4, 3, 2), 2, 13), ((2, 6, 2, 2), 3, 28), ((3, 4, 2, 3), 2, 14)],
)
def test_all_values_of_so_many_axes_meet(sizes, strength, most):
    axes = [[f"{axis}{i}" for i in range(size)] for axis, size in zip("abcd", sizes, strict=False)]
    points = covering(*axes, strength=strength)
    assert len(points) == len(set(points)) <= most
    for some in combinations(range(len(axes)), strength):
        want = set(product(*(axes[axis] for axis in some)))
        assert {tuple(point[axis] for axis in some) for point in points} == want
    assert points == covering(*axes, strength=strength)
