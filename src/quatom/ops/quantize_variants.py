"""How quantize.cu is cut for a batch: threads, tokens and CTAs."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from quatom.numerics.groups import GroupLayout

Operation = Literal["reorder", "norm", "gated"]
_CLUSTERS = ((16, 8), (128, 2))
"""Tokens of a batch up to which so many CTAs share a token whose groups share a scale; 8 is the
largest cluster that any Hopper GPU can hold."""
_TWO_TOKENS_FROM = 512
"""With this many tokens or more in a batch, a CTA takes two of them."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How a CTA of quantize.cu is cut."""

    threads: int
    tokens: int
    """Tokens of a CTA: 1 or 2."""
    ctas: int = 1
    """CTAs of a token: several only for gated, which gathers nothing from all over a row."""


@lru_cache(maxsize=4096)
def choose_variant(
    operation: Operation, tokens: int, layout: GroupLayout, whole_token: bool = False
) -> Variant:
    """The fastest variant measured, see docs/lab/kernels-linear.md."""
    pairs = -(-layout.num_scales // 2)  # a warp takes two groups
    if operation == "gated" and not whole_token:
        return Variant(128, 1, -(-pairs // 4))
    if operation == "gated":
        for most_tokens, ctas in _CLUSTERS:
            if tokens <= most_tokens:
                warps = min(32, max(4, -(-pairs // ctas)))
                return Variant(warps * 32, 1, min(ctas, -(-pairs // warps)))
    two_tokens = tokens >= _TWO_TOKENS_FROM and operation != "gated"
    # Two wide rows fill registers: large CTAs, few of which fit, would all wait at the same time.
    most = 10 if two_tokens and operation == "reorder" and pairs > 16 else 16
    rounds = -(-pairs // most)
    if two_tokens and whole_token and pairs > 8:
        rounds = max(rounds, 2)  # half the CTA waits at the barrier of the maximum
    return Variant(-(-pairs // rounds) * 32, 2 if two_tokens else 1)
