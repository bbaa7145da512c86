"""The weights of one decoder layer, floating-point or rounded: what `build_block` makes a block of.

Rows of q and k are in rotary order (`quatom.numerics.rotary.head_order`): channels that turn
together are half a head apart, whatever order the model's files have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from quatom.families.spec import NormName, RouterTensor, SiteName


@dataclass(frozen=True, slots=True)
class FloatSite:
    """The joined weight of a site in floating point.

    That of routed experts has a leading dimension E, and so has the order where each expert's input
    has one of its own.
    """

    weight: Tensor  # (N, K), channels in the order that `order` gives them
    bias: Tensor | None = None  # (N,)
    order: Tensor | None = None  # (K,) int64, old channel at each position; None: as they come
    divided_by: Tensor | None = None  # (K,) float32, factors that a transform took from the input


@dataclass(frozen=True, slots=True)
class SiteCodes:
    """The joined weight of a site in codes, in the order of rows and channels of operations.

    That of routed experts has a leading dimension E.
    """

    values: Tensor  # (N, K) codes of any dtype that holds them, in units of the scales
    scales: Tensor  # (N, S) float16
    bias: Tensor | None = None  # (N,)
    order: Tensor | None = None  # (K,) int64, as above

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        bias, order = (None if t is None else t.to(device) for t in (self.bias, self.order))
        return type(self)(self.values.to(device), self.scales.to(device), bias, order)


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Parameters of a norm."""

    weight: Tensor  # (K,)
    bias: Tensor | None = None  # (K,)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Everything that a decoder layer holds."""

    norms: Mapping[NormName, NormWeights]
    sites: Mapping[SiteName, FloatSite | SiteCodes]
    qk_norm: tuple[Tensor, Tensor] | None = None
    """Weights of the norms of q and k, as `quatom.ops.head_norm` reads them."""
    key_offset: Tensor | None = None  # (KV, D) float32
    sinks: Tensor | None = None  # (H,) float32
    """Logits of query heads that take part in the softmax's sum: see `Attention.sinks`."""
    router: Mapping[RouterTensor, Tensor] = field(default_factory=dict)
    """float32 tensors beside routed experts: see `quatom.families.spec.RouterTensor`."""


@dataclass(frozen=True, slots=True)
class FloatLayer(LayerWeights):
    """A layer whose weights are all floating-point: what transforms rewrite."""

    sites: Mapping[SiteName, FloatSite]


def matrices(weight: Tensor) -> Tensor:  # (N, K) or (E, N, K) -> (E, N, K)
    """The matrices of a site: those of all experts, or the only one."""
    return weight if weight.ndim == 3 else weight.unsqueeze(0)
