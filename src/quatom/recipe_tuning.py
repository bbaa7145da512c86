"""What a recipe learns by gradients, block by block, towards the output of the float network."""

from dataclasses import dataclass
from typing import Any, Literal

from quatom.errors import RecipeError
from quatom.recipe_fields import check_types


def _check(spec: Any, rates: tuple[str, ...], counts: tuple[str, ...] = ()) -> None:
    check_types("tuning", spec)
    for name in ("steps", "sequences", *counts):
        if getattr(spec, name) < 1:
            raise RecipeError(f"tuning.{name} must be at least 1, got {getattr(spec, name)}")
    for name in rates:
        if not 0.0 <= getattr(spec, name) < 1.0:
            raise RecipeError(f"tuning.{name} must be in [0, 1), got {getattr(spec, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSpec:
    """Codes, scales of rows, norms and key offset, moved once weights are rounded.

    What moves is stored anyway: it costs nothing at run time.
    """

    method: Literal["codes"] = "codes"
    """From the codes that the rounder found."""
    steps: int = 200
    """Steps of Adam on each block."""
    sequences: int = 8
    """Calibration sequences of a step."""
    code_rate: float = 0.005
    """How far a step moves a weight at first, in units of its scale; it falls to 0 linearly."""
    scale_rate: float = 0.0003
    """The same of the logarithms of scales and norms, and of the key offset by its own size."""

    def __post_init__(self) -> None:
        _check(self, ("code_rate", "scale_rate"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniQuantSpec:
    """Clip ratios of weights, and factors of channels and keys; codes are the nearest ones.

    Factors are folded into norms and weights, and cost nothing at run time.
    """

    method: Literal["omniquant"] = "omniquant"
    """OmniQuant; it needs float16 scales, and channels that stay where they are."""
    steps: int = 320
    """Steps of Adam on each block: 20 epochs of 128 sequences."""
    sequences: int = 8
    """Calibration sequences of a step."""
    clip_rate: float = 0.01
    """How far a step moves a clip ratio's logit at first; it falls to 0 linearly."""
    factor_rate: float = 0.005
    """The same of the logarithms of factors; 0: only clip ratios are learned."""

    def __post_init__(self) -> None:
        _check(self, ("clip_rate", "factor_rate"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankSpec:
    """A product of two thin matrices, added to each weight before it is rounded to nearest.

    Only the rounded sum is stored: it costs nothing at run time.
    """

    method: Literal["low_rank"] = "low_rank"
    """Low-rank correction; it needs weights rounded to nearest with float16 scales, no outliers."""
    rank: int = 4
    """Columns of one matrix and rows of the other."""
    steps: int = 1280
    """Steps of Adam on each block: 10 epochs of 128 sequences."""
    sequences: int = 1
    """Calibration sequences of a step."""
    rate: float = 0.0005
    """How far a step moves an entry of the matrices at first; it falls to 0 linearly."""

    def __post_init__(self) -> None:
        _check(self, ("rate",), ("rank",))
