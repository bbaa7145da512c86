"""Slots sorted by expert, and the sum of a token's results."""

from dataclasses import dataclass

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.experts.routing import TokenGroups

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


def group_tokens(
    expert_ids: Tensor,  # (T, k) int32
    num_experts: int,
    *,
    backend: Backend | None = None,
) -> TokenGroups:
    """Sort slots by expert on the device: no host reads the routing.

    Args:
        expert_ids: from 0 to num_experts - 1; nothing checks them on a device.
        num_experts: E.
        backend: implementation to run; None picks the fastest one for the device.

    Raises:
        ShapeError: expert_ids is no matrix, or there is no expert.
    """
    if expert_ids.ndim != 2 or num_experts < 1:
        raise ShapeError(
            f"expected expert_ids (T, k) of at least one expert; got {tuple(expert_ids.shape)} of "
            f"{num_experts}"
        )
    flat = expert_ids.flatten()
    if choose_backend("group_tokens", BACKENDS, flat.device, backend) is Backend.TRITON:
        from quatom.ops.experts.triton_groups import group_triton as run
    else:
        from quatom.ops.experts.reference import group_reference as run
    return TokenGroups(*run(flat, num_experts))


def combine(
    y: Tensor,  # (T k, hidden) in grouped order
    groups: TokenGroups,
    weights: Tensor,  # (T, k) float32
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Weighted sum of each token's k results, (T, hidden) in y's dtype.

    Products and sums are float32, each rounded by itself, in ascending order of j: a token's result
    does not depend on where its slots are grouped.

    Args:
        y: of `expert_linear`; float16, bfloat16 or float32.
        groups: those that y is grouped by.
        weights: of the routing.
        backend: implementation to run; None picks the fastest one for the device.

    Raises:
        ShapeError: y, groups and weights do not fit each other.
    """
    if (
        y.ndim != 2
        or weights.ndim != 2
        or not (y.shape[0] == weights.numel() == groups.slots.numel())
    ):
        raise ShapeError(
            f"expected y (T k, hidden) and weights (T, k) of {groups.slots.numel()} slots; got "
            f"{tuple(y.shape)} and {tuple(weights.shape)}"
        )
    if choose_backend("combine", BACKENDS, y.device, backend) is Backend.TRITON:
        from quatom.ops.experts.triton_groups import combine_triton as run
    else:
        from quatom.ops.experts.reference import combine_reference as run
    return run(y, groups.positions, weights.float())


@dataclass(frozen=True, slots=True)
class ExpertSum:
    """`combine` of these, which is still to be done: what reads it may add up as it reads."""

    y: Tensor  # (T k, hidden) in grouped order
    groups: TokenGroups
    weights: Tensor  # (T, k) float32 contiguous
    backend: Backend | None = None

    def combine(self) -> Tensor:
        """The sum."""
        return combine(self.y, self.groups, self.weights, backend=self.backend)


def summed(x: Tensor | ExpertSum) -> Tensor:
    """Numbers as they are, or the sum that is still to be done."""
    return x.combine() if isinstance(x, ExpertSum) else x
