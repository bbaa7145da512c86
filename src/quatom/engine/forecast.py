"""DemandForecast: will the KV cache hold everyone until they end, if one more request starts?

Sequences grow by a token a step and give their blocks back when they end. With r_j tokens still to
come and p_j tokens that will be freed, in the order of ends, the cache holds at the k-th end

    used + sum over j of min(r_j, r_k) - sum over j < k of p_j

and the largest of these must fit. Without such a look ahead, requests are admitted into room that
the running ones are about to need: they are preempted later and their work is done twice.

Source: the Past-Future scheduler (Gong et al., ASPLOS 2025), with a mean in place of a sampled
distribution of output lengths.
"""

from collections.abc import Sequence as Rows

import numpy as np

from quatom.engine.sequence import Sequence

PRIOR_OUTPUT = 256
"""Tokens that a completion is expected to generate before any has ended."""
MEMORY = 64
"""Completions over which the mean output length is taken, roughly."""


class DemandForecast:
    """How long completions turn out to be, and what that means for KV blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._mean_output = float(PRIOR_OUTPUT)
        self._count = 0

    def observe(self, sequence: Sequence) -> None:
        """A completion ended by itself or at its length limit.

        One that may not end before its limit says nothing about others.
        """
        if sequence.params.ignore_eos:
            return
        self._count = min(self._count + 1, MEMORY)
        self._mean_output += (sequence.num_output - self._mean_output) / self._count

    def expected_rest(self, sequence: Sequence) -> int:
        """Tokens that a sequence still generates: its limit, or the mean where it may end before.

        One that has outlived the mean is expected to take half of it again.
        """
        limit = sequence.max_total - sequence.num_tokens
        if not sequence.params.ignore_eos:
            generated = sequence.num_output
            limit = min(limit, max(int(self._mean_output) - generated, int(self._mean_output) // 2))
        return max(limit, 1)

    def peak_blocks(self, sequences: Rows[Sequence], used_blocks: int) -> int:
        """Most blocks held at once until all `sequences` have ended.

        Args:
            sequences: running ones and the candidate.
            used_blocks: held now, those that the candidate would take included.
        """
        rest = np.array([self.expected_rest(sequence) for sequence in sequences])
        freed = rest + [sequence.num_tokens - sequence.num_cached for sequence in sequences]
        order = rest.argsort(kind="stable")
        rest, freed = rest[order], freed[order]
        still_running = np.arange(len(rest), 0, -1)
        growth = np.cumsum(rest) - rest + rest * still_running
        released = np.cumsum(freed) - freed
        # The last block of a sequence is half empty on average, before and after it grows.
        peak_tokens = int((growth - released).max())
        return used_blocks + -(-peak_tokens // self._block_size)
