"""How far a model's predictions are from those of another, token by token.

Perplexity counts only what a model says of the tokens that came; these count all that it says. They
tell recipes apart on small models whose task scores do not.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quatom.errors import CalibrationError
from quatom.evaluation.standard_error import of_mean
from quatom.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class Divergence:
    """Means over the predicted tokens of all windows; standard errors are over windows."""

    same_top1: float
    """Fraction of tokens at which both models find the same token most probable."""
    same_top1_standard_error: float | None
    """None of a single window, as the other."""
    kl_to_float: float
    """KL(reference || model) in nats."""
    kl_to_float_standard_error: float | None
    loss_increase: float
    """Mean loss of the model's own less that of the reference, in nats."""
    loss_increase_standard_error: float | None
    """Both models read the same windows: a text that is hard for both adds nothing to it."""


def check_same_vocabulary(loaded: LoadedModel, reference: LoadedModel) -> None:
    """Refuse to compare predictions of different tokens.

    Raises:
        CalibrationError: the vocabularies have other sizes.
    """
    sizes = loaded.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise CalibrationError(
            f"{loaded.source} knows {sizes[0]} tokens and the reference {reference.source} "
            f"{sizes[1]}: compare a model with the one that it was quantized from"
        )


@dataclass(slots=True)
class DivergenceMeter:
    """Sums up windows of equal length."""

    agreement: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    increase: list[float] = field(default_factory=list)

    def add(self, logits: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Count one window, from pieces of both models' logits.

        Args:
            logits: of the model and of the reference, (tokens, vocabulary) float32, and the tokens
                that came, (tokens,) int64.
        """
        same, total, increase = torch.zeros(3, dtype=torch.float64).unbind()
        tokens = 0
        for own, other, came in logits:
            same += (own.argmax(dim=-1) == other.argmax(dim=-1)).sum().cpu()
            own, other = own.log_softmax(dim=-1), other.log_softmax(dim=-1)
            total += (other.exp() * (other - own)).sum(dim=-1).double().sum().cpu()
            worse = (other - own).gather(1, came.unsqueeze(1))
            increase += worse.double().sum().cpu()
            tokens += own.shape[0]
        self.agreement.append(float(same) / tokens)
        self.divergence.append(float(total) / tokens)
        self.increase.append(float(increase) / tokens)

    def result(self) -> Divergence:
        """What all windows gave."""
        return Divergence(
            same_top1=math.fsum(self.agreement) / len(self.agreement),
            same_top1_standard_error=of_mean(self.agreement),
            kl_to_float=math.fsum(self.divergence) / len(self.divergence),
            kl_to_float_standard_error=of_mean(self.divergence),
            loss_increase=math.fsum(self.increase) / len(self.increase),
            loss_increase_standard_error=of_mean(self.increase),
        )
