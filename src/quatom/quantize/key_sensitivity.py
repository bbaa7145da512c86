"""Statistics of keys, weighted by how much an error of each key changes attention's output.

Rounding moves the score of query q and key t by q . e, and the output of attention by

    p(q, t) * (v_t - out_q) * scale * (q . e)        to first order,

so its square counts w(q, t) = p(q, t)**2 |v_t - out_q|**2 times: keys that nobody looks at, and
keys whose value is the output already, may be as wrong as they like. A sink takes its share of p.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quatom.families.spec import Attention
from quatom.numerics.rotary import grow_queries
from quatom.ops.attention.reference import softmax_beside
from quatom.ops.rope_append_kv.reference import rotate_halves

SEQUENCES = 8
"""Calibration sequences that are measured. More changed no result, and each takes L**2 scores."""


class KeySensitivity:
    """Weighted sums over the q, k and v of a float block; the first sequences of the text."""

    def __init__(
        self,
        attention: Attention,
        length: int,
        rotary: tuple[Tensor, Tensor],
        sinks: Tensor | None = None,  # (H,) float32
        first: int = 0,
    ) -> None:
        """Start with sequence `first` of the text."""
        self.attention, self.length, self.sinks = attention, length, sinks
        self.cos, self.sin = (table[:length] for table in rotary)
        self.sequences = first
        self.sums: dict[str, Tensor] = {}

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Accumulate whole sequences, before rotary embedding.

        Args:
            q: (T, H, D).
            k: (T, KV, D).
            v: (T, KV, D), rotated or not: its lengths alone count.
        """
        for parts in zip(*(x.split(self.length) for x in (q, k, v)), strict=True):
            if self.sequences >= SEQUENCES:
                return
            self.sequences += 1
            self._add_sequence(*(x.float() for x in parts))

    def _add_sequence(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        shared = self.attention.num_heads // self.attention.num_kv_heads
        q = grow_queries(q, self.attention.query_growth, self.length)
        q, k = (rotate_halves(x, self.cos, self.sin).transpose(0, 1) for x in (q, k))
        queries, values = q.unflatten(0, (-1, shared)), v.transpose(0, 1)
        measured = []
        for head, (query, key, value) in enumerate(zip(queries, k, values, strict=True)):
            sinks = self.sinks  # one KV head at a time: only so many scores are in memory
            if sinks is not None:
                sinks = sinks[head * shared : (head + 1) * shared]
            # (shared, L, L)
            weights = score_sensitivity(query, key, value, self.attention, sinks)
            of_key, of_query = weights.sum(dim=(0, 1)), weights.sum(dim=2)
            measured.append(
                (
                    of_key.sum(),
                    of_key @ key,
                    _pairs(of_key @ key.square()),
                    _pairs(torch.einsum("hl,hld->d", of_query, query.square())),
                )
            )
        names = ("weight", "keys", "key_squares", "query_squares")
        for name, parts in zip(names, zip(*measured, strict=True), strict=True):
            found = torch.stack(parts)
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def finish(self) -> Mapping[str, Tensor]:
        """Weighted means: of K after rotary embedding, and of the squares of rotary pairs."""
        weight = self.sums["weight"].unsqueeze(1).clamp(min=torch.finfo(torch.float32).tiny)
        return {
            "weighted_key_mean": self.sums["keys"] / weight,  # (KV, D)
            "weighted_key_squares": self.sums["key_squares"] / weight,  # (KV, D / 2)
            "weighted_query_squares": self.sums["query_squares"] / weight,
        }


def score_sensitivity(
    q: Tensor,  # (heads, L, D) after rotary embedding
    k: Tensor,  # (L, D) after rotary embedding
    v: Tensor,  # (L, D)
    attention: Attention,
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:
    """Squared change of each query's output per squared change of q . k, (heads, L, L) float32.

    The constant factor scale**2 is left out.
    """
    length = k.shape[0]
    scores = (q @ k.t()) * attention.scale
    slope: Tensor | None = None
    if attention.logit_softcap is not None:
        bent = (scores / attention.logit_softcap).tanh()
        scores, slope = bent * attention.logit_softcap, 1 - bent.square()
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if attention.window is not None:
        seen &= ~seen.tril(-attention.window)
    beside = None if sinks is None else sinks.unsqueeze(1)
    p = softmax_beside(scores.masked_fill_(~seen, -torch.inf), beside)
    out = p @ v
    # |v - out|**2 by its three terms; what rounding leaves below zero is none.
    distance = v.square().sum(dim=-1) - 2 * out @ v.t() + out.square().sum(dim=-1, keepdim=True)
    weights = p.square() * distance.clamp_(min=0)
    return weights if slope is None else weights * slope.square()


def _pairs(squares: Tensor) -> Tensor:  # (D,) -> (D / 2,)
    """Sums over the two channels of each rotary pair."""
    return squares.unflatten(-1, (2, -1)).sum(dim=-2)
