"""Run a block over calibration text and measure what transforms and rounders need."""

from collections.abc import Callable, Mapping

from torch import Tensor

from quatom.families.spec import Attention, SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.rotary import RotaryTables
from quatom.quantize.expert_statistics import ExpertSums, Statistic, down_input
from quatom.quantize.key_sensitivity import KeySensitivity
from quatom.quantize.statistics import (
    ChannelScores,
    KeyStatistics,
    Metric,
    SecondMoments,
    observe,
    run_block,
)
from quatom.recipe import Recipe

Moments = dict[str, Tensor]
"""A matrix for each site; for sites of routed experts one per expert, (E, K, K)."""
EXPERT_TOKENS = "expert_tokens"
"""Among statistics: tokens that came to each expert, (E,) int64."""

_OF_SCALING: Mapping[str, frozenset[Metric]] = {
    "balanced": frozenset({"second_moment"}),
    "smoothquant": frozenset({"absmax"}),
    "awq": frozenset({"abs_mean"}),
}
"""Scores of input channels that each method of channel scaling reads."""
_EXPERT_SITES: tuple[SiteName, ...] = ("experts_gate_up", "experts_down")


def _metrics(recipe: Recipe) -> frozenset[Metric]:
    scaling = recipe.channel_scaling
    return frozenset({recipe.outliers.metric}) | (_OF_SCALING[scaling.method] if scaling else set())


def _searches_factors(recipe: Recipe) -> bool:
    return recipe.channel_scaling is not None and recipe.channel_scaling.method == "awq"


def wanted_statistics(recipe: Recipe) -> tuple[str, ...]:
    """Names of what a recipe measures; recipes of equal names share their statistics."""
    names: set[str] = {*_metrics(recipe)}
    if _searches_factors(recipe):
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
        sinks: Tensor | None,  # (H,) float32
    ) -> None:
        self.rotary = rotary
        self.scores = [ChannelScores(metric) for metric in sorted(_metrics(recipe))]
        self.moments = SecondMoments() if _searches_factors(recipe) else None
        self.keys = KeyStatistics(attention, length)
        self.sensitivity = (
            KeySensitivity(attention, length, rotary, sinks)
            if recipe.kv_cache.weighs_keys
            else None
        )

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

    def see_input(self, site: SiteName, x: Tensor) -> None:
        """Measure the input of a site, (T, K)."""
        for scores in self.scores:
            scores.add(site, x)
        if self.moments is not None and site not in _EXPERT_SITES:
            self.moments.add(site, x)

    def see_heads(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Measure q (T, H, D), k and v (T, KV, D) before rotary embedding."""
        self.keys.add(q, k)
        if self.sensitivity is not None:
            self.sensitivity.add(q, k, v)


def measure_channels(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden)
    rotary: RotaryTables,
    recipe: Recipe,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a floating-point block, and its statistics as `LayerStatistics` names them.

    All experts of a layer read one input in one order, so its scores are those of all tokens. The
    input of their down projections has scores of each expert, (E, K).
    """
    attention, cos_sin = block.spec.attention, rotary.of(block.plan.index)
    measured = LayerStatistics(recipe, attention, hidden.shape[1], cos_sin, block.sinks)
    metric, bound = recipe.outliers.metric, recipe.calibration.min_expert_tokens
    routed = _routed(block, ChannelScores(metric), ("experts_down",), bound)
    output = _run(block, hidden, rotary, routed, measured.see_input, measured.see_heads)
    statistics = measured.finish()
    if routed is not None:
        statistics[f"{metric}.experts_down"] = routed.finish("experts_down")
        statistics[EXPERT_TOKENS] = routed.tokens
    return output, statistics


def measure_moments(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden)
    rotary: RotaryTables,
    *,
    tf32: bool,
    bound: int,
) -> tuple[Moments, Tensor | None]:
    """X^T X of the input X of every site, and the tokens of each expert, (E,) int64.

    Args:
        block: floating-point weights, inputs as the quantized network will have them.
        hidden: what enters it.
        rotary: tables of the model.
        tf32: as in `SecondMoments`.
        bound: tokens below which an expert is measured on all of them, too.
    """
    moments = SecondMoments(tf32=tf32)
    routed = _routed(block, moments, _EXPERT_SITES, bound)
    _run(block, hidden, rotary, routed, moments.add)
    if routed is None:
        return moments.sums, None
    return moments.sums | {site: routed.finish(site) for site in _EXPERT_SITES}, routed.tokens


def _routed(
    block: DecoderBlock, statistic: Statistic, sites: tuple[SiteName, ...], bound: int
) -> ExpertSums | None:
    experts = block.spec.experts
    return None if experts is None else ExpertSums(statistic, experts.count, bound, sites)


def _run(
    block: DecoderBlock,
    hidden: Tensor,
    rotary: RotaryTables,
    routed: ExpertSums | None,
    see_input: Callable[[SiteName, Tensor], None],
    see_heads: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The block's output. Sites that are measured by expert are shown to `routed` alone."""
    by_expert = () if routed is None else routed.sites

    def see(site: SiteName, x: Tensor) -> None:
        if site not in by_expert:
            see_input(site, x)

    see_experts = None if routed is None else routed.add
    with observe(block, see, see_heads=see_heads, see_experts=see_experts):
        output = run_block(block, hidden, rotary)
    if routed is not None and (starving := routed.starving()):
        _see_all_tokens(block, hidden, rotary, routed, starving)
    return output


def _see_all_tokens(
    block: DecoderBlock,
    hidden: Tensor,
    rotary: RotaryTables,
    routed: ExpertSums,
    starving: list[int],
) -> None:
    """A second pass, in which experts to which few tokens came read all of them."""

    def see(site: SiteName, x: Tensor) -> None:
        if site != "experts_gate_up":
            return
        for expert in starving:
            if site in routed.sites:
                routed.add_all(site, expert, x)
            routed.add_all("experts_down", expert, down_input(block, expert, x))

    with observe(block, see):
        run_block(block, hidden, rotary)
