"""Places in the pages of the KV cache, worked out once for all layers of one geometry.

`KVPages.plan_append` and `KVPages.plan_gather` make them; `quatom.numerics.kv_pages` has the
layout.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """Where the K and V of some new tokens go."""

    tokens: Tensor | None  # (kept,) int64, the tokens that are stored; None: all
    words: Tensor  # (kept * KV * 2 * X,) int64, places in the storage seen as one row of words


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """Where the K and V of some blocks are."""

    shape: tuple[int, int, int, int]
    """(2, B, KV, n * S): K and V, sequences, heads, tokens."""
    rows: Tensor  # int64, pieces of the storage that hold the codes, or the values
    pairs: Tensor | None  # (2 * B * KV * n,) int64, pieces that hold the pairs
    written: Tensor  # (B, 1, n * S) int32, all bits set for a token that there is, or none
