"""Calibration sequences cut into lanes, which processes share, and sums that do not depend on them.

A lane is a run of sequences: whole batches, at most `LANES` lanes in all, whatever the number of
processes. Process r of n has lanes r, r + n, r + 2n...

Float sums depend on their order. Each lane is summed up from zero, batch after batch, by the one
process that has it, and the sums of lanes are added one after another, in the order of lanes. One
process alone does just that. So the result is the same, bit for bit, for every number of processes,
as long as they compute alike: the same library, kind of device and number of threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.plan import LayerPlan
from quatom.quantize.ranks import Ranks, describe
from quatom.quantize.statistics import sequences_per_batch

LANES = 16
"""More than processes in use; each costs one more addition of all sums."""
MAXIMUM = "absmax."
"""What names of maxima begin with; all other statistics are sums."""

Sums = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Share:
    """The sequences of this process."""

    ranks: Ranks
    sequences: int
    """Of all processes."""
    length: int
    """Tokens of a sequence."""

    @classmethod
    def of_one(cls, hidden: Tensor) -> Self:  # (sequences, length, hidden)
        """All of them, of a process alone."""
        return cls(Ranks(), hidden.shape[0], hidden.shape[1])

    def owner(self, layer: LayerPlan, site: str) -> int:
        """The process that rounds a site of a layer, and so gets its moments."""
        return list(layer.sites).index(cast("SiteName", site)) % self.ranks.count

    @property
    def lanes(self) -> tuple[range, ...]:
        """Sequences of every lane."""
        each = sequences_per_batch(self.length)
        batches = -(-self.sequences // each)
        step = each * -(-batches // LANES)
        starts = range(0, self.sequences, step)
        return tuple(range(start, min(start + step, self.sequences)) for start in starts)

    @property
    def own(self) -> Tensor:
        """Sequences of this process, (s,) int64, ascending."""
        lanes = self.lanes[self.ranks.rank :: self.ranks.count]
        return torch.tensor([sequence for lane in lanes for sequence in lane], dtype=torch.int64)

    def sum_up(
        self,
        measure: Callable[[slice, int], Sums],
        owner: Callable[[str], int],
        device: torch.device,
    ) -> Sums:
        """Sums over all lanes, each at its owner and nowhere else.

        Args:
            measure: the sums of one lane, from its rows among the own sequences and the number of
                its first sequence among all.
            owner: process that gets a sum, by its name.
            device: where sums lie.
        """
        ranks, lanes, totals, start = self.ranks, self.lanes, Sums(), 0
        for first in range(0, len(lanes), ranks.count):
            part = Sums()
            with ranks.together():
                if (index := first + ranks.rank) < len(lanes):
                    rows = slice(start, start + len(lanes[index]))
                    part, start = measure(rows, lanes[index].start), rows.stop
            if ranks.count == 1:
                for name, tensor in part.items():
                    _add(totals, name, tensor)
                continue
            for source, described in enumerate(ranks.tell(describe(part))):
                for name, like in described.items():
                    target = owner(name)
                    if ranks.rank == source == target:
                        _add(totals, name, part.pop(name))
                    elif ranks.rank == source:
                        ranks.send(part.pop(name), target)
                    elif ranks.rank == target:
                        _add(totals, name, ranks.receive(like, source, device))
        return totals

    def collect(self, rows: Tensor) -> Tensor | None:
        """Rows (s, ...) of the own sequences of all processes, in order, at the leading one."""
        if self.ranks.count == 1:
            return rows
        described = [told["rows"] for told in self.ranks.tell(describe({"rows": rows}))]
        if not self.ranks.leads:
            if rows.numel():
                self.ranks.send(rows, 0)
            return None
        whole = rows.new_empty((self.sequences, *rows.shape[1:]))
        for source, like in enumerate(described):
            if not like.shape[0]:
                continue
            theirs = Share(Ranks(source, self.ranks.count), self.sequences, self.length).own
            part = rows if source == 0 else self.ranks.receive(like, source, rows.device)
            whole[theirs.to(rows.device)] = part
        return whole


def _add(totals: Sums, name: str, tensor: Tensor) -> None:
    if name not in totals:
        totals[name] = tensor
    elif name.startswith(MAXIMUM):
        torch.maximum(totals[name], tensor, out=totals[name])
    else:
        totals[name] += tensor
