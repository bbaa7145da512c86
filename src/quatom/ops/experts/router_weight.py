"""A router's float32 weight as 16-bit numbers, which matrix units multiply."""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PARTS = 3
"""Of 8 or 11 bits each: float32 has 24."""
_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True, slots=True)
class RouterWeight:
    """W = parts[0] + step parts[1] + step^2 parts[2], with as many parts as there must be.

    Products of 16-bit numbers are exact in float32. A weight that came in 16 bits is one part.
    """

    parts: Tensor  # (P, E, K) float16 or bfloat16
    step: float

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> "RouterWeight | None":
        """The parts of a float32 weight (E, K); None where numbers are beyond the dtype's range.

        float16 has no bits below 2**-24: what three parts lose of a number is below 2**-46.
        """
        step = 2.0 ** -_BITS[dtype]
        parts: list[Tensor] = []
        rest = weight.float()
        while len(parts) < MOST_PARTS and (not parts or bool(rest.any())):
            parts.append(rest.to(dtype))
            rest = (rest - parts[-1].float()) / step  # exact, as `step` is a power of two
        stacked = torch.stack(parts)
        return cls(stacked, step) if bool(stacked.isfinite().all()) else None
