"""What calibration measures of routed experts: each from the tokens that came to it.

A token that goes to an expert with weight w counts as much as its error does in the layer's output:
w**2 in second moments and mean squares, w in mean magnitudes, over the sum of the same. Where fewer
than `bound` tokens came, n of them, the result is

    n / bound * (its own mean) + (1 - n / bound) * (the mean over all tokens, each counted once)

as if all tokens had gone to this expert. So an expert that no token chose is measured on all. A
token whose squared weight is 0 in float32 says nothing of the expert and has not come to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, cast

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.inputs import InputQuantizer
from quatom.modeling.linear import FloatExperts
from quatom.modeling.rotated import RotatedLinear
from quatom.ops.activations import MixedTensor
from quatom.ops.experts import Routing, TokenGroups

OF_EXPERTS = "experts/"
"""What names of sums over routed experts begin with; their site follows."""
TOKENS = f"{OF_EXPERTS}tokens"
"""Name of the tokens that came to each expert, (E,) int64 on the CPU."""


def _name(site: SiteName, *what: str | int) -> str:
    return ".".join((OF_EXPERTS + site, *map(str, what)))


class Statistic(Protocol):
    """Sums over rows of an input: channel scores (K,), or second moments (K, K)."""

    def zeros(self, x: Tensor) -> Tensor:
        """The sum over no rows of an input like x (T, K)."""

    def accumulate(self, total: Tensor, x: Tensor) -> None:
        """Add the rows of x (T, K), float32, to a sum."""


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """The input of a site of routed experts in one batch, and who reads which of its rows."""

    site: SiteName
    x: Tensor  # (T, K), or (T k, K) in grouped order where `top_k` is None
    top_k: int | None
    groups: TokenGroups
    routing: Routing

    def by_expert(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Expert, its rows (n, K) and the router's weights of them (n, 1), where n > 0."""
        ends = self.groups.offsets.tolist()
        weights = self.routing.weights.flatten()
        for expert, (first, last) in enumerate(pairwise(ends)):
            if first == last:
                continue
            slots = self.groups.slots[first:last].long()
            rows = self.x[first:last] if self.top_k is None else self.x[slots // self.top_k]
            yield expert, rows.float(), weights[slots].unsqueeze(1)

    def tokens(self) -> Tensor:  # (E,) int64
        """Tokens that came to each expert with a weight that counts."""
        came = self.routing.expert_ids[self.routing.weights.square() > 0]
        return came.long().bincount(minlength=self.groups.num_experts)


class ExpertSums:
    """One statistic of the inputs of all experts of a layer."""

    def __init__(
        self, statistic: Statistic, experts: int, bound: int, sites: tuple[SiteName, ...]
    ) -> None:
        """Start with no token.

        Args:
            statistic: what is summed up.
            experts: E.
            bound: tokens below which an expert's own are blended with all.
            sites: those whose experts are measured one by one.
        """
        self.statistic, self.bound, self.sites = statistic, bound, sites
        self.sums: dict[str, Tensor] = {TOKENS: torch.zeros(experts, dtype=torch.int64)}
        """By `OF_EXPERTS` and SITE.own, (E, ...), the sums; SITE.shares, (E, 1, ...), the same over
        the router's weights; SITE.all.EXPERT and SITE.count.EXPERT, over all tokens."""

    def start(self) -> Self:
        """The same without any token."""
        return type(self)(self.statistic, len(self.tokens), self.bound, self.sites)

    @property
    def tokens(self) -> Tensor:
        """Tokens that came to each expert, (E,) int64."""
        return self.sums[TOKENS]

    def add(self, inputs: ExpertInputs) -> None:
        """Accumulate one batch."""
        site, sums = inputs.site, self.sums
        if inputs.top_k is not None:  # a layer's tokens are counted at its first site
            sums[TOKENS] += inputs.tokens().cpu()
        if site not in self.sites:
            return
        own, shares = _name(site, "own"), _name(site, "shares")
        for expert, rows, weights in inputs.by_expert():
            if own not in sums:
                shape = (len(self.tokens), *self.statistic.zeros(rows).shape)
                sums[own] = rows.new_zeros(shape)
                sums[shares] = rows.new_zeros(shape[0], *(1 for _ in shape[1:]))
            self.statistic.accumulate(sums[own][expert], rows * weights)
            self.statistic.accumulate(sums[shares][expert], weights)

    def starving(self) -> list[int]:
        """Experts to which fewer tokens than the bound came."""
        return (self.tokens < self.bound).nonzero().flatten().tolist()

    def add_all(self, site: SiteName, expert: int, x: Tensor) -> None:  # (T, K)
        """Accumulate what an expert would read if all tokens of a batch went to it."""
        name, count = _name(site, "all", expert), _name(site, "count", expert)
        if name not in self.sums:
            self.sums[name] = self.statistic.zeros(x)
            self.sums[count] = torch.tensor(0)
        self.statistic.accumulate(self.sums[name], x.float())
        self.sums[count] += len(x)

    def finish(self, site: SiteName) -> Tensor:  # (E, K) or (E, K, K)
        """The statistic of every expert, blended where few tokens came."""
        sums, shares = (self.sums.pop(_name(site, what)) for what in ("own", "shares"))
        for expert, own in enumerate(sums):
            total = self.sums.pop(_name(site, "all", expert), None)
            if total is None:
                continue
            share = min(1.0, int(self.tokens[expert]) / self.bound)
            if share and shares[expert] > 0:
                own.mul_(share / shares[expert])
            count = int(self.sums.pop(_name(site, "count", expert)))
            own.add_(total, alpha=(1.0 - share) / count)
        return sums


def down_input(block: DecoderBlock, expert: int, x: Tensor) -> Tensor:  # (T, hidden) -> (T, I)
    """What an expert's down projection would read if all tokens went to it; float weights."""
    gate_up, spec = block.linears["experts_gate_up"], block.spec.experts
    assert isinstance(gate_up, FloatExperts | RotatedLinear)
    assert spec is not None
    made = gate_up.of_expert(expert, x)
    quantizer = cast("InputQuantizer", block.inputs["experts_down"])
    result = quantizer.activate(made, spec.feed_forward)
    return result.dequantize() if isinstance(result, MixedTensor) else result
