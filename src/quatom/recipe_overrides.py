"""Other formats than a recipe's own, for some layers and sites."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quatom.errors import RecipeError
from quatom.recipe_fields import check_types
from quatom.recipe_formats import ActivationFormat, KVFormat, WeightFormat

ALL = "all"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChange:
    """Fields in place of those of `weights`."""

    format: WeightFormat | None = None
    """Number format of a code, quantized where the recipe's is."""
    group_size: int | None = None
    """Consecutive input channels that share one scale."""
    scale_format: Literal["float16", "multiples", "packed_multiples"] | None = None
    """How scales are stored; multiples are for int2 to int4."""

    def __post_init__(self) -> None:
        check_types("overrides.weights", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationChange:
    """Fields in place of those of `activations`."""

    format: ActivationFormat | None = None
    """Number format of a code."""
    group_size: int | None = None
    """Consecutive channels that share one scale; -1: all normal channels of a token."""
    scale_format: Literal["float16", "multiples"] | None = None
    """How the scales of a token depend on each other."""
    clip_ratio: float | None = None
    """Fraction of a group's absolute maximum that maps onto the largest code."""

    def __post_init__(self) -> None:
        check_types("overrides.activations", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierChange:
    """Fields in place of those of `outliers`."""

    channels: int | None = None
    """Outlier channels of the input."""
    max_fraction: float | None = None
    """Upper bound as a fraction of the hidden size."""

    def __post_init__(self) -> None:
        check_types("overrides.outliers", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVChange:
    """Fields in place of those of `kv_cache`."""

    format: KVFormat | None = None
    """Number format of a code."""
    clip_ratio: float | None = None
    """Fraction of a group's range that maps onto the code range."""

    def __post_init__(self) -> None:
        check_types("overrides.kv_cache", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Formats of some sites of some layers. Where two overrides meet, the later one wins."""

    layers: str = ALL
    """Numbers and ranges of layers, from 0, both ends included: "0-2,7"; or "all"."""
    sites: tuple[str, ...] = ()
    """Sites: qkv, o, gate_up, down, experts_gate_up, experts_down. None named: all of a layer."""
    weights: WeightChange | None = None
    """What differs of the weights; None: nothing."""
    activations: ActivationChange | None = None
    """What differs of the inputs; None: nothing."""
    outliers: OutlierChange | None = None
    """What differs of the outlier channels; None: nothing."""
    kv_cache: KVChange | None = None
    """What differs of the KV cache, of whole layers; None: nothing."""

    def __post_init__(self) -> None:
        check_types("overrides", self)
        self.ranges()
        if self.kv_cache is not None and self.sites:
            raise RecipeError(
                f"overrides.kv_cache is for whole layers, and sites {', '.join(self.sites)} are "
                "named: give it an override without sites"
            )
        if not any(self.changes().values()):
            raise RecipeError(f"the override of layers {self.layers!r} changes nothing")

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last number of each range of layers; () for all of them.

        Raises:
            RecipeError: `layers` is not written so.
        """
        if self.layers == ALL:
            return ()
        found = []
        for part in self.layers.split(","):
            match = _RANGE.fullmatch(part.strip())
            first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
            if last < first:
                raise RecipeError(
                    f'overrides.layers must be numbers and ranges like "0-2,7", or "all", got '
                    f"{self.layers!r}"
                )
            found.append((first, last))
        return tuple(found)

    def covers(self, layer: int, site: str | None) -> bool:
        """Whether it is for a site of a layer; None: for the layer as a whole."""
        ranges = self.ranges()
        if ranges and not any(first <= layer <= last for first, last in ranges):
            return False
        return not self.sites or site in self.sites

    def changes(self) -> dict[str, dict[str, Any]]:
        """New values of fields, by the part of the recipe that they are in."""
        parts = {
            "weights": self.weights,
            "activations": self.activations,
            "outliers": self.outliers,
            "kv_cache": self.kv_cache,
        }
        return {
            name: {key: value for key, value in asdict(part).items() if value is not None}
            for name, part in parts.items()
            if part is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what it leaves as it is."""
        where = {"layers": self.layers} | ({"sites": list(self.sites)} if self.sites else {})
        return where | self.changes()
