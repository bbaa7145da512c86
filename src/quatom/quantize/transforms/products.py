"""Free products of two matrices of a factor that one has and the other takes back.

A model whose v_proj is 2**11 times smaller and whose o_proj is 2**11 times larger computes the
same function, but its values, and the scales of the weights, of the activations between the two
and of the KV cache, fall below 2**-14, where float16 loses precision. Both matrices get the same
root mean square, as near as a power of two comes: no mantissa changes, and what is rounded later
is the same whatever the factor was. One factor serves a whole matrix, so that channels keep their
order.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, matrices
from quatom.plan import LayerPlan

SMALLEST_POWER = 4
"""Matrices nearer to balance stay as they are. Scales of trained weights are about 2**-7 and more,
so a factor of 2**3 leaves them far above 2**-14."""


def balance_products(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """v_proj balanced against o_proj and, where a factor passes, up_proj against down_proj.

    Attention is linear in V, and most gated layers are in the output of up_proj. Every expert is
    balanced on its own.
    """
    attention, spec = layer.spec.attention, layer.spec
    weights = _balance(weights, "qkv", attention.q_size + attention.kv_size, "o")
    if spec.feed_forward is not None and spec.feed_forward.linear_in_up:
        weights = _balance(weights, "gate_up", spec.feed_forward.size, "down")
    if spec.experts is not None and spec.experts.feed_forward.linear_in_up:
        size = spec.experts.feed_forward.size
        weights = _balance(weights, "experts_gate_up", size, "experts_down")
    return weights


def _balance(weights: FloatLayer, makes: SiteName, first: int, takes: SiteName) -> FloatLayer:
    """Scale the rows of a site from `first` on, and undo it in the columns of another."""
    maker, taker = weights.sites[makes], weights.sites[takes]
    rows, columns = matrices(maker.weight), matrices(taker.weight)
    powers = [balancing_power(m[first:], t) for m, t in zip(rows, columns, strict=True)]
    if not any(powers):
        return weights
    made, taken = maker.weight.clone(), taker.weight.clone()
    bias = None if maker.bias is None else maker.bias.clone()
    for index, power in enumerate(powers):
        matrices(made)[index, first:] *= 2.0**power
        matrices(taken)[index] *= 2.0**-power
        if bias is not None:
            bias.view(len(powers), -1)[index, first:] *= 2.0**power
    scaled = {
        makes: replace(maker, weight=made, bias=bias),
        takes: replace(taker, weight=taken),
    }
    return replace(weights, sites={**weights.sites, **scaled})


def balancing_power(maker: Tensor, taker: Tensor) -> int:
    """The power of two p that brings the root mean squares of maker 2**p and taker 2**-p together.

    0 where one of them is all zero or not finite, and where p would be below SMALLEST_POWER.
    """
    made, taken = (
        float(torch.linalg.vector_norm(m, dtype=torch.float32)) / m.numel() ** 0.5
        for m in (maker, taker)
    )
    if not (0.0 < made < math.inf and 0.0 < taken < math.inf):
        return 0
    power = round(math.log2(taken / made) / 2)
    return power if abs(power) >= SMALLEST_POWER else 0
