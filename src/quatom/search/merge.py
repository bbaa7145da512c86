"""Overrides of single places as few overrides of ranges of layers and lists of sites."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from quatom.families.spec import SITES
from quatom.recipe_overrides import Override


def merge(overrides: Iterable[Override]) -> tuple[Override, ...]:
    """The same for every place.

    Args:
        overrides: each of one layer and of one site or the KV cache, no place twice.
    """
    changes: dict[Override, dict[str, list[int]]] = {}
    for override in overrides:
        sites = changes.setdefault(replace(override, layers="all", sites=()), {})
        for site in override.sites or ("",):
            sites.setdefault(site, []).append(int(override.layers))
    merged = []
    for change, sites in changes.items():
        alike: dict[str, list[str]] = {}
        for site, layers in sites.items():
            alike.setdefault(in_ranges(layers), []).append(site)
        for where, names in alike.items():
            ordered = tuple(site for site in SITES if site in names)
            merged.append(replace(change, layers=where, sites=ordered))
    return tuple(merged)


def in_ranges(numbers: Iterable[int]) -> str:
    """[3, 0, 1, 2, 7] -> "0-3,7"."""
    ordered = sorted(numbers)
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    spans = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
