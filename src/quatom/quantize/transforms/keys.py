"""Make cached keys easier to round: subtract what all share, and balance them with queries."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.modeling.weights import FloatLayer
from quatom.plan import LayerPlan


def offset_keys(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Subtract the mean of K from every cached K, where softmax does not see it."""
    if not layer.offsets_keys:
        return weights
    weighted = layer.kv_cache.key_offset == "weighted"
    name = "weighted_key_mean" if weighted else "key_mean"
    return replace(weights, key_offset=statistics[name])


def balance_keys(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Divide k by factors and multiply q by them; K's offset is divided, too.

    Rounding puts an error of one size on all channels of a (rotated) head, which a score weighs
    with its query's. Dividing K by l and multiplying q by it leaves scores as they are, and the
    error is least where l**4 = E[k**2] / E[q**2]. One l serves a rotary pair, whose channels mix.
    With key_scaling "balanced" all tokens count alike and l is a power of two, which changes no
    mantissa; with "weighted" each token counts as in `KeySensitivity`, and l is not rounded. Where
    q and k are normalized, the norms' weights take the factors.
    """
    return divide_keys(layer, weights, _balance(layer, weights, statistics))


def divide_keys(
    layer: LayerPlan,
    weights: FloatLayer,
    scale: Tensor,  # (KV, D) float32, alike on both channels of a rotary pair
) -> FloatLayer:
    """The layer with k divided by factors and q multiplied by them."""
    attention = layer.spec.attention
    shared = attention.num_heads // attention.num_kv_heads
    queries, keys = scale.repeat_interleave(shared, dim=0), 1 / scale
    offset = weights.key_offset
    weights = replace(weights, key_offset=None if offset is None else offset / scale)
    if weights.qk_norm is not None:
        return _scale_norms(layer, weights, queries, keys)
    rows = torch.cat((queries, keys, torch.ones_like(scale))).flatten()
    qkv = weights.sites["qkv"]
    weight = (qkv.weight * rows.unsqueeze(1)).to(qkv.weight.dtype)
    bias = None if qkv.bias is None else (qkv.bias * rows).to(qkv.bias.dtype)
    return replace(weights, sites={**weights.sites, "qkv": replace(qkv, weight=weight, bias=bias)})


def _balance(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> Tensor:  # (KV, D) float32
    """What K is divided by."""
    weighted = layer.kv_cache.key_scaling == "weighted"
    prefix = "weighted_" if weighted else ""
    keys, queries = (statistics[f"{prefix}{x}_squares"] for x in ("key", "query"))  # (KV, D / 2)
    if (offset := weights.key_offset) is not None:
        # E[(k - o)**2] of an o that need not be the mean of these statistics.
        lost = (2 * statistics[f"{prefix}key_mean"] - offset) * offset
        keys = keys - lost.unflatten(-1, (2, -1)).sum(dim=-2)
    if weights.qk_norm is not None and layer.spec.attention.qk_norm_axis == "head":
        # All heads share one weight, and so one balance.
        keys, queries = (x.sum(dim=0, keepdim=True).expand_as(x) for x in (keys, queries))
    alive = (keys > 0) & (queries > 0)
    power = torch.where(alive, (keys / queries).log2() / 4, torch.zeros_like(keys))
    return (power if weighted else power.round()).exp2().repeat(1, 2)


def _scale_norms(
    layer: LayerPlan,
    weights: FloatLayer,
    queries: Tensor,  # (H, D)
    keys: Tensor,  # (KV, D)
) -> FloatLayer:
    """Factors of q and k folded into the weights of their norms."""
    attention = layer.spec.attention
    assert attention.qk_norm is not None
    assert weights.qk_norm is not None
    offset = attention.qk_norm.weight_offset
    scaled = []
    for weight, factors in zip(weights.qk_norm, (queries, keys), strict=True):
        match attention.qk_norm_axis:
            case "head":
                factor = factors[0]
            case "each":
                factor = factors
            case "all":
                factor = factors.flatten()
        scaled.append(((weight.float() + offset) * factor - offset).to(weight.dtype))
    return replace(weights, qk_norm=(scaled[0], scaled[1]))
