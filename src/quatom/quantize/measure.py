"""Run a block over calibration text and measure the inputs of its sites."""

from collections.abc import Callable

from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.rotary import RotaryTables
from quatom.quantize.expert_statistics import ExpertSums, down_input
from quatom.quantize.statistics import (
    ChannelScores,
    KeyStatistics,
    SecondMoments,
    observe,
    run_block,
)

Moments = dict[str, Tensor]
"""A matrix for each site; for sites of routed experts one per expert, (E, K, K)."""
EXPERT_TOKENS = "expert_tokens"
"""Among statistics: tokens that came to each expert, (E,) int64."""


def measure_channels(
    block: DecoderBlock,
    hidden: Tensor,  # (sequences, length, hidden)
    rotary: RotaryTables,
    scores: ChannelScores,
    *,
    bound: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a floating-point block, and its statistics.

    All experts of a layer read one input in one order, so its scores are those of all tokens; an
    input of their down projections has scores of each expert.

    Args:
        block: the block.
        hidden: what enters it.
        rotary: tables of the model.
        scores: what to measure of channels.
        bound: tokens below which an expert is measured on all of them, too.
    """
    keys = KeyStatistics(block.spec.attention, hidden.shape[1])
    output, tokens = _measure(block, hidden, rotary, scores, ("experts_down",), bound, keys.add)
    statistics = scores.sums | keys.finish(rotary.of(block.plan.index))
    return output, statistics if tokens is None else statistics | {EXPERT_TOKENS: tokens}


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
    sites: tuple[SiteName, ...] = ("experts_gate_up", "experts_down")
    _, tokens = _measure(block, hidden, rotary, moments, sites, bound)
    return moments.sums, tokens


def _measure(
    block: DecoderBlock,
    hidden: Tensor,
    rotary: RotaryTables,
    statistic: ChannelScores | SecondMoments,
    sites: tuple[SiteName, ...],
    bound: int,
    see_heads: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fill `statistic.sums`. Returns the block's output, and the tokens of each expert."""
    experts = block.spec.experts

    def see(site: SiteName, x: Tensor) -> None:
        if site != "experts_down":  # whose rows are not all of one expert
            statistic.add(site, x)

    if experts is None:
        with observe(block, see, see_heads=see_heads):
            return run_block(block, hidden, rotary), None
    routed = ExpertSums(statistic, experts.count, bound, sites)
    with observe(block, see, see_heads=see_heads, see_experts=routed.add):
        output = run_block(block, hidden, rotary)
    if starving := routed.starving():
        _see_all_tokens(block, hidden, rotary, routed, starving)
    for site in sites:
        statistic.sums[site] = routed.finish(site)
    return output, routed.tokens


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
