"""Order the input channels of every site by importance, the outliers last.

Source: Atom (Zhao et al., MLSys 2024).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quatom.checkpoint.codec import repeat_rows
from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer, FloatSite
from quatom.numerics.reorder import channel_order
from quatom.plan import LayerPlan, SitePlan


def choose_orders(layer: LayerPlan, scores: Mapping[SiteName, Tensor]) -> dict[SiteName, Tensor]:
    """Channel order of every site that has outliers, from scores (K,) by site: (K,) int64.

    Scores of a folded input of routed experts are (E, K), and so is its order: every expert has its
    own.
    """
    return {
        name: _order(scores[name], site)
        for name, site in layer.sites.items()
        if site.order != "none"
    }


def _order(scores: Tensor, site: SitePlan) -> Tensor:
    if scores.ndim == 1:
        return channel_order(scores, site.block_outliers, site.blocks)
    return torch.stack([_order(own, site) for own in scores])


def order_channels(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor]
) -> FloatLayer:
    """Columns of every weight in the order of its input's channels.

    An order that is not gathered is folded into the rows of the linears that make the input.
    """
    scores = {name: _scores(layer.sites[name], weights, statistics) for name in layer.sites}
    orders = choose_orders(layer, scores)
    sites = {
        name: replace(held, weight=order_columns(held.weight, orders[name]), order=orders[name])
        if name in orders
        else held
        for name, held in weights.sites.items()
    }
    return replace(weights, sites=fold_orders(layer, sites, orders))


def fold_orders(
    layer: LayerPlan, sites: Mapping[SiteName, FloatSite], orders: Mapping[SiteName, Tensor]
) -> dict[SiteName, FloatSite]:
    """The sites, with rows that make the input of an ordered site in that order."""
    folded = dict(sites)
    for name in layer.sites:
        if (rows := made_rows(layer, name, orders)) is not None:
            held = folded[name]
            bias = None if held.bias is None else gather_rows(held.bias, rows)
            folded[name] = replace(held, weight=gather_rows(held.weight, rows), bias=bias)
    return folded


def _scores(site: SitePlan, weights: FloatLayer, statistics: Mapping[str, Tensor]) -> Tensor:
    """Scores of a site's input as earlier transforms left it, (K,)."""
    metric, factor = site.outliers.metric, weights.sites[site.name].divided_by
    scores = statistics[f"{metric}.{site.name}"]
    if factor is None:
        return scores
    return scores / (factor if metric == "abs_mean" else factor.square())


def made_rows(layer: LayerPlan, name: SiteName, orders: Mapping[SiteName, Tensor]) -> Tensor | None:
    """Old row at each row of a site whose rows are in the order of the input that they make.

    (N,) int64, or (E, N) of routed experts.
    """
    made = layer.sites[name].makes
    if made is None or made not in orders:
        return None
    order = orders[made]
    return repeat_rows(order, layer.sites[name].rows // order.shape[-1])


def gather_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Rows (N, ...) in an order (N,), or those of every expert, (E, N, ...), in its own (E, N)."""
    if order.ndim == 1:
        return rows[order]
    return torch.stack([own[own_order] for own, own_order in zip(rows, order, strict=True)])


def order_columns(weight: Tensor, order: Tensor) -> Tensor:
    """Columns of all matrices in one order (K,), or of every expert's in its own (E, K)."""
    if order.ndim == 1:
        return weight[..., order]
    return torch.stack([own[:, own_order] for own, own_order in zip(weight, order, strict=True)])
