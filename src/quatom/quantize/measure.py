"""Run a block over calibration text and measure what transforms and rounders need."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from quatom.families.spec import Attention, SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.rotary import RotaryTables
from quatom.quantize.expert_statistics import (
    OF_EXPERTS,
    TOKENS,
    ExpertSums,
    Statistic,
    down_input,
)
from quatom.quantize.input_samples import InputSamples
from quatom.quantize.key_sensitivity import KeySensitivity
from quatom.quantize.lanes import Share
from quatom.quantize.statistics import (
    ChannelScores,
    KeyStatistics,
    Metric,
    SecondMoments,
    inputs_alone,
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
    scaling, own = recipe.channel_scaling, set[Metric]({recipe.outliers.metric})
    own |= {"absmax"} if recipe.channel_splitting else set()
    return frozenset(own) | (_OF_SCALING[scaling.method] if scaling else set())


def _reads_moments(recipe: Recipe) -> bool:
    scaling = recipe.channel_scaling
    return recipe.channel_splitting is not None or (scaling is not None and scaling.method == "awq")


def wanted_statistics(recipe: Recipe) -> tuple[str, ...]:
    """Names of what a recipe measures; recipes of equal names share their statistics."""
    names: set[str] = {*_metrics(recipe)}
    if _reads_moments(recipe):
        names.add("moments")
    if recipe.channel_splitting is not None:
        names.add("samples")
    if recipe.kv_cache.weighs_keys:
        names.add("key_sensitivity")
    return (*sorted(names), recipe.kv_cache.value_rotation)


class LayerStatistics:
    """Measures one layer while the float stream runs through it.

    Results by name: "METRIC.SITE" (K,) float32 of every metric that the recipe reads,
    "moments.SITE" (K, K) and "samples.SITE" (T, K) float32, and what keys' statistics give.
    """

    def __init__(
        self,
        recipe: Recipe,
        attention: Attention,
        length: int,
        rotary: tuple[Tensor, Tensor],  # cos, sin
        sinks: Tensor | None,  # (H,) float32
        first: int = 0,
    ) -> None:
        """Start with sequence `first` of the text."""
        self.rotary = rotary
        self.scores = [ChannelScores(metric) for metric in sorted(_metrics(recipe))]
        self.moments = SecondMoments() if _reads_moments(recipe) else None
        self.samples = InputSamples(length, first) if recipe.channel_splitting else None
        self.keys = KeyStatistics(attention, length)
        self.sensitivity = (
            KeySensitivity(attention, length, rotary, sinks, first)
            if recipe.kv_cache.weighs_keys
            else None
        )

    def sums(self) -> dict[str, Tensor]:
        """Everything that was measured, as sums that can be added to those of other sequences."""
        found = {f"keys.{name}": sums for name, sums in self.keys.sums.items()}
        for scores in self.scores:
            found |= {f"{scores.metric}.{site}": sums for site, sums in scores.sums.items()}
        if self.moments is not None:
            found |= {f"moments.{site}": sums for site, sums in self.moments.sums.items()}
        if self.samples is not None:
            found |= {f"samples.{site}": sums for site, sums in self.samples.sums.items()}
        if self.sensitivity is not None:
            found |= {f"sensitivity.{n}": sums for n, sums in self.sensitivity.sums.items()}
        return found

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics by name, from the sums of all sequences."""
        found = {n: t for n, t in sums.items() if not n.startswith(("keys.", "sensitivity."))}
        self.keys.sums = _named("keys.", sums)
        found |= self.keys.finish(self.rotary)
        if self.sensitivity is not None:
            self.sensitivity.sums = _named("sensitivity.", sums)
            found |= self.sensitivity.finish()
        return found

    def see_input(self, site: SiteName, x: Tensor) -> None:
        """Measure the input of a site, (T, K)."""
        for scores in self.scores:
            scores.add(site, x)
        if self.moments is not None and site not in _EXPERT_SITES:
            self.moments.add(site, x)
        if self.samples is not None and site not in _EXPERT_SITES:
            self.samples.add(site, x)

    def see_heads(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Measure q (T, H, D), k and v (T, KV, D) before rotary embedding."""
        self.keys.add(q, k)
        if self.sensitivity is not None:
            self.sensitivity.add(q, k, v)


def _named(prefix: str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in sums.items() if n.startswith(prefix)}


def measure_channels(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden), the own ones of `share`
    rotary: RotaryTables,
    recipe: Recipe,
    share: Share | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a floating-point block, and its statistics as `LayerStatistics` names them.

    All experts of a layer read one input in one order, so its scores are those of all tokens. The
    input of their down projections has scores of each expert, (E, K). The leading process finishes
    statistics, and all get the same.
    """
    share = share or Share.of_one(hidden)
    attention, cos_sin = block.spec.attention, rotary.of(block.plan.index)
    metric, bound = recipe.outliers.metric, recipe.calibration.min_expert_tokens
    output = torch.empty_like(hidden)

    def start(first: int) -> LayerStatistics:
        return LayerStatistics(recipe, attention, hidden.shape[1], cos_sin, block.sinks, first)

    def run(rows: slice, first: int, routed: ExpertSums | None) -> dict[str, Tensor]:
        measured = start(first)
        see = measured.see_input, measured.see_heads
        output[rows] = _run(block, hidden[rows], rotary, routed, *see)
        return measured.sums()

    empty = _routed(block, ChannelScores(metric), ("experts_down",), bound)
    sums, routed = _sum_up(share, block, hidden, rotary, run, empty, lambda _: 0)
    statistics: dict[str, Tensor] = {}
    with share.ranks.together():
        if share.ranks.leads:
            if routed is not None:
                sums[f"{metric}.experts_down"] = routed.finish("experts_down")
                sums[EXPERT_TOKENS] = routed.tokens
            statistics = start(0).finish(sums)
    return output, share.ranks.from_rank(statistics, 0, hidden.device)


def measure_moments(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden), the own ones of `share`
    rotary: RotaryTables,
    *,
    tf32: bool,
    bound: int,
    share: Share | None = None,
) -> tuple[Moments, Tensor | None]:
    """X^T X of the input X of every site, and the tokens of each expert, (E,) int64.

    Each process gets the moments of the sites that it owns.

    Args:
        block: floating-point weights, inputs as the quantized network will have them.
        hidden: what enters it.
        rotary: tables of the model.
        tf32: as in `SecondMoments`.
        bound: tokens below which an expert is measured on all of them, too.
        share: the sequences of this process; None: it is alone.
    """
    share = share or Share.of_one(hidden)

    def run(rows: slice, _: int, routed: ExpertSums | None) -> dict[str, Tensor]:
        moments = SecondMoments(tf32=tf32)
        with inputs_alone(block):
            _run(block, hidden[rows], rotary, routed, moments.add)
        return moments.sums

    owner = partial(share.owner, block.plan)
    empty = _routed(block, SecondMoments(tf32=tf32), _EXPERT_SITES, bound)
    moments, routed = _sum_up(share, block, hidden, rotary, run, empty, owner)
    if routed is None:
        return moments, None
    own = [site for site in _EXPERT_SITES if owner(site) == share.ranks.rank]
    return moments | {site: routed.finish(site) for site in own}, routed.tokens


def _routed(
    block: DecoderBlock, statistic: Statistic, sites: tuple[SiteName, ...], bound: int
) -> ExpertSums | None:
    experts = block.spec.experts
    return None if experts is None else ExpertSums(statistic, experts.count, bound, sites)


def _sum_up(
    share: Share,
    block: DecoderBlock,
    hidden: Tensor,
    rotary: RotaryTables,
    run: Callable[[slice, int, ExpertSums | None], dict[str, Tensor]],
    empty: ExpertSums | None,
    owner: Callable[[str], int],
) -> tuple[dict[str, Tensor], ExpertSums | None]:
    """The sums of `run` over all lanes, and those of experts; each at the owner of its site."""

    def first_pass(rows: slice, first: int) -> dict[str, Tensor]:
        routed = None if empty is None else empty.start()
        sums = run(rows, first, routed)
        return sums if routed is None else sums | routed.sums

    def second_pass(rows: slice, _: int) -> dict[str, Tensor]:
        assert empty is not None
        routed = empty.start()
        _see_all_tokens(block, hidden[rows], rotary, routed, starving)
        return routed.sums

    def owner_of(name: str) -> int:
        return 0 if name == TOKENS else owner(name.removeprefix(OF_EXPERTS).split(".")[0])

    sums = share.sum_up(first_pass, owner_of, hidden.device)
    if empty is None:
        return sums, None
    totals = empty.start()
    totals.sums = {name: sums.pop(name) for name in list(sums) if name.startswith(OF_EXPERTS)}
    totals.sums |= share.ranks.from_rank({n: t for n, t in totals.sums.items() if n == TOKENS}, 0)
    if starving := totals.starving():
        # Its tokens are none: the first site is not measured again.
        totals.sums |= share.sum_up(second_pass, owner_of, hidden.device) | {TOKENS: totals.tokens}
    return sums, totals


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
        return run_block(block, hidden, rotary)


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
