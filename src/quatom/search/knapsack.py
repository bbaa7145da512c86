"""At most one option of each group, so that gains are largest and costs stay within a budget.

That is the multiple-choice knapsack problem. It is solved exactly, for all budgets at once, by the
list of all sums that no cheaper sum beats (Nemhauser and Ullmann, 1969): group after group, every
sum so far is tried with every option, and a sum stays if it gains more than all that cost no more.
A sum that is left out cannot become the best again, as whatever may be added to it may be added to
the sum that beats it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import ceil, gcd, lcm

import numpy as np

_STEPS = 2**40
"""Parts of the largest cost at which costs that have no larger unit are rounded up."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of a group."""

    cost: Fraction
    """Positive."""
    gain: float


Groups = Sequence[Sequence[Choice]]
Chosen = tuple[int | None, ...]
"""The number of an option for each group; None: none of them."""


class Frontier:
    """The best sums of options, from nothing chosen to all that gains."""

    def __init__(self, groups: Groups) -> None:
        """Solve the problem for all budgets."""
        self.unit = _unit(groups)
        costs, gains = np.zeros(1, np.int64), np.zeros(1)
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        for group in groups:
            tried = [(0, 0.0)] + [(ceil(one.cost / self.unit), one.gain) for one in group]
            all_costs = np.concatenate([costs + cost for cost, _ in tried])
            all_gains = np.concatenate([gains + gain for _, gain in tried])
            order = np.lexsort((-all_gains, all_costs))
            best = np.maximum.accumulate(all_gains[order])
            kept = order[np.concatenate(([True], best[1:] > best[:-1]))]
            options, parents = np.divmod(kept, len(costs))
            self._steps.append((options.astype(np.int16), parents.astype(np.int32)))
            costs, gains = all_costs[kept], all_gains[kept]
        self._costs, self._gains = costs, gains

    def __len__(self) -> int:
        """Sums that are the best for some budget."""
        return len(self._costs)

    def position(self, budget: Fraction) -> int:
        """The number of the best sum that costs no more than a budget of at least 0."""
        return int(np.searchsorted(self._costs, int(budget / self.unit), side="right")) - 1

    def cost(self, position: int) -> Fraction:
        """What a sum costs."""
        return int(self._costs[position]) * self.unit

    def gain(self, position: int) -> float:
        """What a sum gains."""
        return float(self._gains[position])

    def options(self, position: int) -> Chosen:
        """What a sum is made of."""
        chosen: list[int | None] = []
        for options, parents in reversed(self._steps):
            option = int(options[position])
            chosen.append(option - 1 if option else None)
            position = int(parents[position])
        return tuple(reversed(chosen))


def _unit(groups: Groups) -> Fraction:
    """What all costs are whole multiples of; or a small part of their sum, if that is larger."""
    costs = [choice.cost for group in groups for choice in group]
    denominator = lcm(*(cost.denominator for cost in costs))
    whole = [cost.numerator * (denominator // cost.denominator) for cost in costs]
    exact = Fraction(reduce(gcd, whole, 0) or 1, denominator)
    return max(exact, sum(costs, Fraction(0)) / _STEPS)
