"""What the operations of `experts` mean, in plain torch: kernels are judged against this file."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from quatom.ops.activations import MixedTensor
from quatom.ops.experts.prepared import PreparedExperts
from quatom.ops.experts.routing import TokenGroups
from quatom.ops.linear import linear


def group_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, offsets and positions of `TokenGroups`; see `group_tokens`."""
    in_order, slots = expert_ids.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=expert_ids.device, dtype=expert_ids.dtype)
    offsets = torch.searchsorted(in_order, bounds)
    positions = torch.empty_like(slots)
    positions[slots] = torch.arange(slots.numel(), device=slots.device)
    return slots.int(), offsets.int(), positions.int()


def combine_reference(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """See `combine`."""
    tokens, k = weights.shape
    places = positions.view(tokens, k).long()
    total = torch.zeros(tokens, y.shape[1], device=y.device)
    for j in range(k):
        total += y[places[:, j]].float() * weights[:, j : j + 1]
    return total.to(y.dtype)


def experts_reference(
    x: MixedTensor | Tensor, experts: PreparedExperts, groups: TokenGroups, top_k: int | None
) -> Tensor:
    """See `expert_linear`: one expert after another, each as a linear layer."""
    positions = groups.slots.numel()
    y = torch.empty((positions, experts.out_channels), dtype=x.dtype, device=x.device)
    for index, (first, last) in enumerate(_runs(groups)):
        rows = _rows(groups, first, last, top_k)
        y[first:last] = linear(_select(x, rows), experts.expert(index))
    return y


def float_reference(
    x: Tensor, weights: Tensor, groups: TokenGroups, top_k: int | None, bias: Tensor | None
) -> Tensor:
    """See `expert_linear`: floating-point experts (E, N, K), one after another."""
    y = x.new_empty((groups.slots.numel(), weights.shape[1]))
    for index, (first, last) in enumerate(_runs(groups)):
        own = x[_rows(groups, first, last, top_k)]
        own_bias = None if bias is None else bias[index].to(x.dtype)
        y[first:last] = torch.nn.functional.linear(own, weights[index], own_bias)
    return y


def _runs(groups: TokenGroups) -> list[tuple[int, int]]:
    """First position of each expert and the one after its last."""
    bounds = groups.offsets.tolist()
    return list(itertools.pairwise(bounds))


def _rows(groups: TokenGroups, first: int, last: int, top_k: int | None) -> Tensor:
    """Rows of x that positions `first` to `last` multiply."""
    if top_k is None:
        return torch.arange(first, last, device=groups.slots.device)
    return groups.slots[first:last].long() // top_k


def _select(x: MixedTensor | Tensor, rows: Tensor) -> MixedTensor | Tensor:
    if isinstance(x, Tensor):
        return x[rows]
    return replace(x, codes=x.codes[rows], scales=x.scales[rows], tokens=rows.numel())
