"""Rotate V, so that no channel of a cached value is much larger than the others."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, FloatSite
from quatom.numerics.hadamard import hadamard_block, rotate_last_axis
from quatom.plan import LayerPlan


def rotate_values(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Fold a Hadamard rotation of every head into v_proj's rows and o_proj's columns.

    Attention mixes tokens, not channels, so its output is rotated like V, and o_proj undoes it.

    Source: QuaRot (Ashkboos et al., NeurIPS 2024).
    """
    attention = layer.spec.attention
    block = hadamard_block(attention.head_dim)
    first = attention.q_size + attention.kv_size  # q and k come before v
    qkv, o = weights.sites["qkv"], weights.sites["o"]
    joined = qkv.weight.clone()
    joined[first:] = rotate_last_axis(joined[first:].t(), block).t().to(joined.dtype)
    bias = qkv.bias
    if bias is not None:
        bias = torch.cat((bias[:first], rotate_last_axis(bias[first:], block))).to(bias.dtype)
    rotated: dict[SiteName, FloatSite] = {
        "qkv": replace(qkv, weight=joined, bias=bias),
        "o": replace(o, weight=rotate_last_axis(o.weight, block).to(o.weight.dtype)),
    }
    return replace(weights, sites={**weights.sites, **rotated})
