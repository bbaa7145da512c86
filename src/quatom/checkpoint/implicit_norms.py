"""Weights of norms that a model's files do not hold, because they are all 1.

A Quatom checkpoint holds them: scaling of channels goes into the weights of norms.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quatom.checkpoint.schema import norm_tensors
from quatom.errors import CheckpointError
from quatom.plan import ModelPlan


@dataclass(frozen=True, slots=True)
class Ones:
    """A tensor of ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor."""
        return torch.ones(self.shape, dtype=self.dtype)


def implicit_norms(
    where: Path, plan: ModelPlan, stored: Iterable[str], dtype: torch.dtype
) -> dict[str, Ones]:
    """Weights of a floating-point model's norms that its files do not hold, by name.

    Args:
        where: what an error names.
        plan: of the model.
        stored: names of tensors in the files.
        dtype: of the weights.

    Raises:
        CheckpointError: the files hold one.
    """
    norms = [(plan.config.final_norm, plan.config.final_norm_name)]
    for layer in plan.layers:
        norms += [(norm, layer.norm_name(name)) for name, norm in layer.spec.norms.items()]
    names = [
        name
        for norm, prefix in norms
        if norm.implicit
        for name in norm_tensors(norm, prefix, plan.config.hidden_size)
    ]
    if found := sorted(set(names) & set(stored)):
        raise CheckpointError(
            f"{where} holds {found[0]}, and norms of family {plan.config.family} have no weights; "
            "config.json and weights do not belong together"
        )
    return {name: Ones((plan.config.hidden_size,), dtype) for name in names}
