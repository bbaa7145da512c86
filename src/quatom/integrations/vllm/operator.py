"""The torch operator of a linear: reorder and quantize its input, multiply.

One operator does both, so that the input of linears that vLLM fuses (q, k, v; gate, up) is
quantized once. In front of a down projection it also multiplies by the gate. Its fake
implementation gives torch.compile the shape of the result. What does not change from call to call
is a `Scheme`, and graphs name it by a text that is equal for equal schemes, so that layers which
are alike share compiled code, also in later processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from quatom.families.spec import FeedForward
from quatom.integrations.vllm.opaque import from_arguments, is_opaque
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.linear import PreparedLinear, linear
from quatom.ops.reorder_quantize import reorder_quantize


@dataclass(frozen=True, slots=True)
class Scheme:
    """A linear without its tensors."""

    spec: QuantizeSpec | None
    """How the input is quantized; None: it stays in floating point."""
    prepared: PreparedLinear
    """With no tensors in it."""
    feed: FeedForward | None = None
    """The input is what gate and up made, and this is done with it before it is quantized."""
    opaque: tuple[bool, ...] = ()
    """Of each weight tensor: the operator gets its number, see `as_argument`."""


_schemes: dict[str, Scheme] = {}


def name_scheme(
    spec: QuantizeSpec | None, prepared: PreparedLinear, feed: FeedForward | None = None
) -> str:
    """The name under which `quatom::site_linear` finds this scheme in this process."""
    opaque = tuple(map(is_opaque, prepared.tensors))
    scheme = Scheme(spec, replace(prepared, tensors=(), bias=None), feed, opaque)
    name = sha256(repr(scheme).encode()).hexdigest()[:16]
    _schemes[name] = scheme
    return name


def site_linear(
    x: Tensor,  # (T, K), or (T, 2 K) of gate and up
    order: Tensor | None,  # (K,) int32
    weights: Sequence[Tensor],  # as `as_argument` makes them
    bias: Tensor | None,  # (N,) float32
    scheme: str,
) -> Tensor:  # (T, N)
    """Multiply the reordered, quantized input by prepared weights."""
    known = _schemes[scheme]
    prepared = replace(known.prepared, tensors=from_arguments(weights, known.opaque), bias=bias)
    if known.spec is not None and known.feed is not None:
        made = gated_quantize(x, known.spec, known.feed.activation, known.feed.gated)
        return linear(made, prepared)
    return linear(read_input(x, order, known.spec), prepared)


def read_input(
    x: Tensor,  # (T, K)
    order: Tensor | None,  # (K,) int32
    spec: QuantizeSpec | None,
) -> Tensor | MixedTensor:
    """What prepared weights multiply: the input in their order, quantized where it is."""
    if spec is not None:
        return reorder_quantize(x, order, spec)
    return x if order is None else x[:, order.long()]


def _site_linear_fake(
    x: Tensor,
    order: Tensor | None,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
) -> Tensor:
    return x.new_empty(x.shape[0], _schemes[scheme].prepared.out_channels)


_library = torch.library.Library("quatom", "FRAGMENT")
_library.define(
    "site_linear(Tensor x, Tensor? order, Tensor[] weights, Tensor? bias, str scheme) -> Tensor"
)
_library.impl("site_linear", site_linear, "CPU")
_library.impl("site_linear", site_linear, "CUDA")
torch.library.register_fake("quatom::site_linear", _site_linear_fake, lib=_library)
