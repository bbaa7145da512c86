"""How far a measured mean may be from that of all examples or texts: its standard error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match")
"""Metrics of lm-evaluation-harness that are 0 or 1 for each example."""


def of_mean(values: Sequence[float]) -> float | None:
    """Sample standard deviation over sqrt(n); None of fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def of_accuracy(entry: Mapping[str, Any]) -> float | None:
    """Of a zero-shot entry whose examples are each right or wrong; None for other metrics.

    That of `of_mean` over zeros and ones, which the value and the number of examples give.
    """
    value, count = entry["value"], entry["examples"]
    if entry["metric"].partition(",")[0] not in _RIGHT_OR_WRONG or count < 2:
        return None
    return math.sqrt(value * (1 - value) / (count - 1))


def of_average(errors: Sequence[float]) -> float:
    """Of the mean of several independent means."""
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
