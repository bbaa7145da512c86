"""What calibration measures of routed experts: each from the tokens that came to it.

A token that goes to an expert with weight w counts as much as its error does in the layer's output:
w**2 in second moments and mean squares, w in mean magnitudes, over the sum of the same. Where fewer
than `bound` tokens came, n of them, the result is

    n / bound * (its own mean) + (1 - n / bound) * (the mean over all tokens, each counted once)

as if all tokens had gone to this expert. So an expert that no token chose is measured on all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.block import DecoderBlock
from quatom.modeling.inputs import InputQuantizer
from quatom.modeling.linear import FloatExperts
from quatom.modeling.rotated import RotatedLinear
from quatom.ops.activations import MixedTensor
from quatom.ops.experts import Routing, TokenGroups


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
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        """Tokens that came to each expert."""
        self._sums: dict[SiteName, Tensor] = {}  # (E, ...)
        self._shares: dict[SiteName, Tensor] = {}  # (E, 1, ...): the same sums over the weights
        self._all: dict[SiteName, dict[int, Tensor]] = {}
        self._all_tokens: dict[SiteName, int] = {}

    def add(self, inputs: ExpertInputs) -> None:
        """Accumulate one batch."""
        if inputs.top_k is not None:  # a layer's tokens are counted at its first site
            self.tokens += inputs.groups.offsets.diff().cpu()
        if inputs.site not in self.sites:
            return
        for expert, rows, weights in inputs.by_expert():
            if inputs.site not in self._sums:
                shape = (len(self.tokens), *self.statistic.zeros(rows).shape)
                self._sums[inputs.site] = rows.new_zeros(shape)
                self._shares[inputs.site] = rows.new_zeros(shape[0], *(1 for _ in shape[1:]))
            self.statistic.accumulate(self._sums[inputs.site][expert], rows * weights)
            self.statistic.accumulate(self._shares[inputs.site][expert], weights)

    def starving(self) -> list[int]:
        """Experts to which fewer tokens than the bound came."""
        return (self.tokens < self.bound).nonzero().flatten().tolist()

    def add_all(self, site: SiteName, expert: int, x: Tensor) -> None:  # (T, K)
        """Accumulate what an expert would read if all tokens of a batch went to it."""
        sums = self._all.setdefault(site, {})
        if expert not in sums:
            sums[expert] = self.statistic.zeros(x)
        self.statistic.accumulate(sums[expert], x.float())
        if expert == next(iter(sums)):
            self._all_tokens[site] = self._all_tokens.get(site, 0) + len(x)

    def finish(self, site: SiteName) -> Tensor:  # (E, K) or (E, K, K)
        """The statistic of every expert, blended where few tokens came."""
        sums, shares = self._sums.pop(site), self._shares.pop(site)
        for expert, total in self._all.pop(site, {}).items():
            share = min(1.0, int(self.tokens[expert]) / self.bound)
            own = sums[expert]
            if share and shares[expert] > 0:
                own.mul_(share / shares[expert])
            own.add_(total, alpha=(1.0 - share) / self._all_tokens[site])
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
