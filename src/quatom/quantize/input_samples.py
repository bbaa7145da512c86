"""A few of the inputs that statistics are made of, kept as they are: for searches that round them.

Each sequence has rows of its own, zero in the samples of others: samples of several processes add
up as all other statistics do.
"""

import torch
from torch import Tensor

SEQUENCES = 8
"""Sequences that inputs are kept of."""
TOKENS = 64
"""Tokens of a sequence, evenly spaced. The first one of a text is not among them where others can
be: it often is the only one with huge activations, and would be counted many times over."""


class InputSamples:
    """Inputs of the first sequences of the text, by site."""

    def __init__(self, length: int, first: int = 0) -> None:
        """Start with sequence `first` of the text; sequences have `length` tokens."""
        self.length, self.first = length, first
        count = min(TOKENS, length)
        self.chosen = (2 * torch.arange(count) + 1) * length // (2 * count)
        self.seen: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}
        """(SEQUENCES * tokens, K) float32; rows of sequences that were not seen are zero."""

    def add(self, site: str, x: Tensor) -> None:  # (T, K), whole sequences
        """Keep the chosen inputs of one batch."""
        count = len(self.chosen)
        for sequence in x.unflatten(0, (-1, self.length)):
            number = self.first + self.seen.get(site, 0)
            if number >= SEQUENCES:
                return
            self.seen[site] = number - self.first + 1
            if site not in self.sums:
                shape = SEQUENCES * count, x.shape[1]
                self.sums[site] = x.new_zeros(shape, dtype=torch.float32)
            rows = sequence[self.chosen.to(x.device)].float()
            self.sums[site][number * count : (number + 1) * count] = rows
