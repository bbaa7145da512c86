"""Which experts a token goes to. All of it is float32, on the input before it is quantized."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quatom.families.spec import Experts, Router, RouterTensor
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.experts import Routing
from quatom.ops.experts.router_weight import RouterWeight

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


class ExpertRouter(nn.Module):
    """Chooses the experts of every token, and says how much each counts."""

    bias: Tensor | None
    correction: Tensor | None

    def __init__(
        self,
        spec: Experts,
        tensors: Mapping[RouterTensor, Tensor],
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name in ("bias", "correction"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self._halves: dict[torch.dtype, RouterWeight | None] = {}

    def forward(self, x: Tensor) -> Routing:  # (T, hidden)
        """Experts (T, k) and their weights (T, k)."""
        if x.dtype is not torch.float32 and runs_fused(self.spec, x.device, self.backend):
            if x.dtype not in self._halves:  # made by the first step, before graphs are captured
                self._halves[x.dtype] = RouterWeight.of(self.weight, x.dtype)
            if (halves := self._halves[x.dtype]) is not None:
                from quatom.ops.experts.triton_routing import route_rows_triton

                options = self.spec.top_k, self.spec.router, self.bias, self.correction
                return Routing(*route_rows_triton(x, halves, *options))
        logits = nn.functional.linear(x.float(), self.weight, self.bias)
        return route(logits, self.spec, self.correction, backend=self.backend)


def runs_fused(spec: Experts, device: torch.device, backend: Backend | None) -> bool:
    """Whether a Triton kernel chooses.

    Groups of experts, corrected softmax scores and sparsemixer have the reference alone.

    Raises:
        BackendError: the backend asked for does not exist.
    """
    if spec.router.scores == "sparsemixer" or spec.router.groups > 1 or spec.corrects_softmax:
        return False
    return choose_backend("route", BACKENDS, device, backend) is Backend.TRITON


def route(
    logits: Tensor,  # (T, E) float32
    spec: Experts,
    correction: Tensor | None = None,  # (E,) float32
    *,
    backend: Backend | None = None,
) -> Routing:
    """The experts of each token from its products with the router's weight.

    Args:
        logits: those products.
        spec: how many experts there are, and how they are chosen.
        correction: of the choice by softmax or sigmoid scores.
        backend: implementation to run; None picks the fastest one for the device (`runs_fused`).
    """
    router = spec.router
    if runs_fused(spec, logits.device, backend):
        from quatom.ops.experts.triton_routing import route_triton

        return Routing(*route_triton(logits, spec.top_k, router, correction=correction))
    match router.scores:
        case "sparsemixer":
            chosen, weights = _sparsemixer(logits, router.jitter)
        case "sigmoid":
            scores = logits.sigmoid()
            chosen = _choice(scores, correction, router).topk(spec.top_k).indices
            weights = scores.gather(1, chosen)
        case "softmax" if correction is not None:
            scores = logits.softmax(-1)
            chosen = (scores + correction).topk(spec.top_k).indices
            weights = scores.gather(1, chosen)
            if router.normalized:
                weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=router.least_sum)
        case _:
            # A softmax leaves the order as it is; normalized, it is the softmax of the chosen.
            best, chosen = logits.topk(spec.top_k)
            weights = (
                best.softmax(-1) if router.normalized else logits.softmax(-1).gather(1, chosen)
            )
    if router.scores == "sigmoid" and router.normalized:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(chosen.int(), (weights * router.scale).contiguous())


def _choice(scores: Tensor, correction: Tensor | None, router: Router) -> Tensor:  # (T, E)
    """What the largest are chosen by: corrected scores, -inf outside of the best groups."""
    corrected = scores if correction is None else scores + correction
    if router.groups == 1:
        return corrected
    grouped = corrected.unflatten(1, (router.groups, -1))  # (T, G, E / G)
    totals = grouped.topk(2).values.sum(dim=-1)
    best = totals.topk(router.top_groups).indices
    allowed = torch.zeros_like(totals, dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)


def _sparsemixer(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:  # (T, 2) each
    """Two experts, one after the other, each with its softmax over what is near enough to it.

    Source: sparse backpropagation for MoE training (Liu et al., 2023), at inference.
    """
    chosen, weights, left = [], [], logits
    for _ in range(2):
        best, index = left.max(dim=-1, keepdim=True)
        size = torch.maximum(logits.abs(), best)
        far = (best - logits) / size > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, index))
        chosen.append(index)
        left = left.scatter(1, index, float("-inf"))
    return torch.cat(chosen, dim=1), torch.cat(weights, dim=1)
