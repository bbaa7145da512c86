"""What calibration and rounding did with every expert of a layer, for the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """How the experts of one layer were quantized."""

    order_tokens: Tensor | None  # (E,) int64
    """Tokens that came to each in the floating-point network, whose inputs order channels."""
    moment_tokens: Tensor | None  # (E,) int64
    """Tokens that came to each in the quantized network, whose inputs GPTQ compensates."""
    nearest: Tensor  # (E,) bool
    """Rounded to nearest although the recipe says GPTQ, because moments could not be inverted."""

    def state(self) -> Tensor:  # (3, E) int64
        """As a tensor, for a run that may be interrupted."""
        unknown = torch.full(self.nearest.shape, _UNKNOWN)
        rows = [self.order_tokens, self.moment_tokens, self.nearest.long()]
        return torch.stack([unknown if row is None else row.cpu() for row in rows])

    @classmethod
    def from_state(cls, state: Tensor) -> Self:
        """What `state` gave."""
        order, moments, nearest = state
        return cls(
            None if (order == _UNKNOWN).all() else order,
            None if (moments == _UNKNOWN).all() else moments,
            nearest.bool(),
        )

    def describe(self, bound: int) -> dict[str, object]:
        """As JSON: tokens of all experts, and what was done with those that are an exception.

        Args:
            bound: tokens below which an expert's statistics are blended with all tokens'.
        """
        exceptions: dict[str, dict[str, object]] = {}
        for name, tokens in self._counts().items():
            for expert, count in enumerate(tokens):
                if count < bound:
                    entry = exceptions.setdefault(str(expert), {})
                    entry[name] = count
                    entry[f"{name}_share"] = round(count / bound, 4)
        for expert in self.nearest.nonzero().flatten().tolist():
            exceptions.setdefault(str(expert), {})["rounding"] = "nearest"
        return {**self._counts(), "bound": bound, "exceptions": exceptions}

    def sentences(self, bound: int) -> list[str]:
        """The exceptions in words, a sentence per expert."""
        sentences = []
        for expert, counts in enumerate(zip(*self._counts().values(), strict=True)):
            if (count := min(counts)) < bound:
                how = "its statistics are those of all tokens"
                if count:
                    share = count / bound
                    how = f"its statistics are {share:.0%} its own and the rest those of all tokens"
                sentences.append(f"expert {expert}: {count} tokens of at least {bound}, {how}")
        for expert in self.nearest.nonzero().flatten().tolist():
            sentences.append(f"expert {expert}: rounded to nearest, its moments were singular")
        return sentences

    def _counts(self) -> dict[str, Sequence[int]]:
        named = {"order_tokens": self.order_tokens, "moment_tokens": self.moment_tokens}
        return {name: tokens.tolist() for name, tokens in named.items() if tokens is not None}
