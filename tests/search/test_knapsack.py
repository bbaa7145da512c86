"""The knapsack against every combination, and what a frontier promises."""

from fractions import Fraction
from itertools import product
from random import Random

import pytest

from quatom.search.knapsack import Choice, Frontier


def total(groups, chosen):
    taken = [g[i] for g, i in zip(groups, chosen, strict=True) if i is not None]
    return sum((c.cost for c in taken), Fraction(0)), sum(c.gain for c in taken)


def every_choice(groups):
    return product(*([None, *range(len(group))] for group in groups))


def random_groups(seed):
    """Costs of three unlike denominators, gains that may be negative."""
    draw = Random(seed)
    costs = (Fraction(draw.randint(1, 9), draw.choice((7, 12, 30))) for _ in iter(int, 1))
    return [
        [Choice(next(costs), draw.uniform(-0.2, 1.0)) for _ in range(draw.randint(1, 3))]
        for _ in range(6)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_combinations(seed):
    groups = random_groups(seed)
    frontier = Frontier(groups)
    sums = [total(groups, chosen) for chosen in every_choice(groups)]
    for budget in (Fraction(0), *(Fraction(k, 8) for k in range(1, 40)), *(c for c, _ in sums[:9])):
        position = frontier.position(budget)
        cost, gain = total(groups, frontier.options(position))
        assert cost <= budget
        assert (frontier.cost(position), frontier.gain(position)) == (cost, pytest.approx(gain))
        assert gain == pytest.approx(max(gain for cost, gain in sums if cost <= budget))


def test_more_budget_never_gains_less():
    frontier = Frontier(random_groups(3))
    costs = [frontier.cost(i) for i in range(len(frontier))]
    gains = [frontier.gain(i) for i in range(len(frontier))]
    assert costs == sorted(set(costs))
    assert gains == sorted(set(gains))
    assert (costs[0], gains[0]) == (0, 0.0)
    assert frontier.position(Fraction(10**6)) == len(frontier) - 1


def test_what_gains_nothing_is_not_bought():
    groups = [[Choice(Fraction(1), 0.0), Choice(Fraction(2), -1.0)]]
    assert Frontier(groups).options(len(Frontier(groups)) - 1) == (None,)


def test_of_equal_gains_the_cheapest():
    groups = [[Choice(Fraction(2), 0.5), Choice(Fraction(1), 0.5)]]
    frontier = Frontier(groups)
    assert frontier.options(frontier.position(Fraction(2))) == (1,)


def test_costs_without_a_common_unit_are_rounded_up():
    """Whole numbers of the common unit would not fit 64 bits."""
    primes = (2**61 - 1, 2**31 - 1, 2**19 - 1)
    groups = [[Choice(Fraction(p // 3, p), 1.0 + i)] for i, p in enumerate(primes)]
    frontier = Frontier(groups)
    budget = sum((g[0].cost for g in groups), Fraction(0))
    assert frontier.position(budget + frontier.unit * 3) == len(frontier) - 1
    for position in range(len(frontier)):
        cost, _ = total(groups, frontier.options(position))
        assert cost <= frontier.cost(position) <= cost + 3 * frontier.unit
