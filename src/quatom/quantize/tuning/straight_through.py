"""Rounding that gradients pass as if it were not there.

Source: the straight-through estimator (Bengio et al., 2013).
"""

from typing import Any

import torch
from torch import Tensor

from quatom.numerics.hadamard import rotate_groups
from quatom.numerics.kv_codes import asymmetric_codes, asymmetric_range
from quatom.ops.activations import QuantizeSpec
from quatom.ops.reorder_quantize import reorder_quantize


class _Input(torch.autograd.Function):
    """Forward is the operation that the quantized block runs; backward undoes order and rotation.

    A gather by the inverse order always gives the same bytes, where torch's own gradient of a
    gather adds up in whatever order threads come. Where channels repeat their gradients are summed,
    with the same bytes under torch's deterministic algorithms (`quatom.quantize.tuning.descent`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor | None, spec: QuantizeSpec | None, repeats: bool
    ) -> Tensor:
        ctx.order, ctx.spec, ctx.repeats = order, spec, repeats
        if spec is not None:
            return reorder_quantize(x, order, spec).dequantize().to(x.dtype)
        return x if order is None else x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0]
        if ctx.spec is not None and ctx.spec.rotate:
            gradient = rotate_groups(gradient, ctx.spec.layout).to(gradient.dtype)
        if ctx.order is not None and ctx.repeats:
            parts = gradient
            gradient = torch.zeros_like(parts).index_add_(-1, ctx.order, parts)
        elif ctx.order is not None:
            gradient = gradient.index_select(-1, ctx.order.argsort())
        return gradient, None, None, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """The nearest integers, ties to even; the gradient of x itself."""
    rounded: Tensor = _Round.apply(x)
    return rounded


def replace_value(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of x."""
    return x + (value - x).detach()


def quantize_input(
    x: Tensor,  # (T, K)
    order: Tensor | None,  # (K,) channel of x at each position
    spec: QuantizeSpec | None,  # None: stays as it is
    *,
    repeats: bool = False,  # whether the order may hold a channel several times
) -> Tensor:
    """What the linears of a site read, of x's dtype; in order, and rotated where the spec says."""
    made: Tensor = _Input.apply(x, order, spec, repeats)
    return made


def quantize_head(x: Tensor, bits: int, clip_ratio: float) -> Tensor:  # (..., D) float32
    """What the cache gives back of keys or values."""
    with torch.no_grad():
        scale, minimum = asymmetric_range(x, bits, clip_ratio)
        codes = asymmetric_codes(x, scale, minimum, bits)
        real = codes.float() * scale.float() + minimum.float()
    return replace_value(x, real)
