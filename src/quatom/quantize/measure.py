"""What a recipe's transforms want to know of a floating-point layer, measured at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from quatom.families.spec import Attention, SiteName
from quatom.modeling.block import DecoderBlock
from quatom.quantize.key_sensitivity import KeySensitivity
from quatom.quantize.statistics import (
    ChannelScores,
    KeyStatistics,
    Metric,
    SecondMoments,
    observe,
)
from quatom.recipe import Recipe

_OF_SCALING: Mapping[str, frozenset[Metric]] = {
    "none": frozenset(),
    "balanced": frozenset({"second_moment"}),
    "smoothquant": frozenset({"absmax"}),
    "awq": frozenset({"abs_mean"}),
}
"""Scores of input channels that each method of channel scaling reads."""


def wanted_statistics(recipe: Recipe) -> tuple[str, ...]:
    """Names of what a recipe measures; recipes of equal names share their statistics."""
    names: set[str] = {recipe.outliers.metric, *_OF_SCALING[recipe.channel_scaling.method]}
    if recipe.channel_scaling.method == "awq":
        names.add("moments")
    if recipe.kv_cache.weighs_keys:
        names.add("key_sensitivity")
    return (*sorted(names), recipe.kv_cache.value_rotation)


class LayerStatistics:
    """Measures one layer while the float stream runs through it.

    Results by name: "METRIC.SITE" (K,) float32 of every metric that the recipe reads,
    "moments.SITE" (K, K) float32, and what `KeyStatistics` and `KeySensitivity` give.
    """

    def __init__(
        self,
        recipe: Recipe,
        attention: Attention,
        length: int,
        rotary: tuple[Tensor, Tensor],  # cos, sin
    ) -> None:
        metrics = {recipe.outliers.metric, *_OF_SCALING[recipe.channel_scaling.method]}
        self.rotary = rotary
        self.scores = [ChannelScores(metric) for metric in sorted(metrics)]
        self.moments = SecondMoments() if recipe.channel_scaling.method == "awq" else None
        self.keys = KeyStatistics(attention, length)
        self.sensitivity = (
            KeySensitivity(attention, length, rotary) if recipe.kv_cache.weighs_keys else None
        )

    @contextmanager
    def watching(self, block: DecoderBlock) -> Iterator[None]:
        """While active, everything that runs through the block is measured."""
        with observe(block, self._see_input, see_heads=self._see_heads):
            yield

    def finish(self) -> dict[str, Tensor]:
        """Everything that was measured, by name."""
        found = dict(self.keys.finish(self.rotary))
        for scores in self.scores:
            found |= {f"{scores.metric}.{site}": sums for site, sums in scores.sums.items()}
        if self.moments is not None:
            found |= {f"moments.{site}": sums for site, sums in self.moments.sums.items()}
        if self.sensitivity is not None:
            found |= self.sensitivity.finish()
        return found

    def _see_input(self, site: SiteName, x: Tensor) -> None:
        for scores in self.scores:
            scores.add(site, x)
        if self.moments is not None:
            self.moments.add(site, x)

    def _see_heads(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys.add(q, k)
        if self.sensitivity is not None:
            self.sensitivity.add(q, k, v)
