"""Few points of a grid that together show what the whole grid would show of its axes."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def covering(*axes: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Points of the product of the axes: any values of any `strength` axes meet in one of them.

    A fault that takes more than `strength` parameters to show may hide between the points; where
    code can have such a fault, the strength is higher or the grid is whole.
    """
    grid = list(product(*(range(len(axis)) for axis in axes)))
    chosen = list(combinations(range(len(axes)), strength))

    def meetings(point: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return {tuple((axis, point[axis]) for axis in some) for some in chosen}

    of = {point: meetings(point) for point in grid}
    left = set().union(*of.values())
    points = []
    while left:  # the first of the points that show most: the same ones every time
        best = max(grid, key=lambda point: len(of[point] & left))
        points.append(best)
        left -= of[best]
    return [tuple(axis[i] for axis, i in zip(axes, point, strict=True)) for point in sorted(points)]
