"""Cut channels of large magnitude into equal parts, in the places of channels merged away.

Channel j becomes T_j = ceil(max|x_j| / threshold) channels x_j / T_j, each with the column of x_j:
the same output, and no input above the threshold widens a token's scale. To keep K, as many other
channels are merged away: half of the channels that stay whole, those of least energy, are matched
with the other half, and the best matches are merged. The threshold is the one whose rounded inputs
give the nearest output.

The channel that stays carries the merged pair alone, and its column takes in the other's, by the
least squares of one input from the other. The paper carries the mean of the two, which the gather
of a channel order cannot make.

Source: QLLM (Liu et al., ICLR 2024), adaptive channel reassembly.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from quatom.families.spec import SiteName
from quatom.modeling.weights import FloatLayer
from quatom.ops.activations import quantize_rows
from quatom.plan import LayerPlan, SitePlan
from quatom.quantize.transforms.order import fold_orders
from quatom.quantize.transforms.scaling import FOLD_ORDER, can_fold, fold_division, readers
from quatom.recipe import SplittingSpec

THRESHOLDS_PER_OCTAVE = 4
"""Thresholds that are tried between one and its half, from the largest magnitude downwards."""


@dataclass(frozen=True, slots=True)
class Reassembly:
    """Input channels after splitting and merging."""

    parts: Tensor  # (K,) int64, of each old channel; 1 where it is whole, or merged away
    order: Tensor  # (K,) int64, old channel at each position; parts of a channel repeat it
    columns: Tensor  # (N, K) float32, at each position, for inputs divided by their parts


def split_channels(
    layer: LayerPlan, weights: FloatLayer, statistics: Mapping[str, Tensor], spec: SplittingSpec
) -> FloatLayer:
    """Every site whose input can take the division; the inputs of the others stay as they are.

    So do inputs that two sites share, since each site has its own channels.
    """
    for name in (name for name in FOLD_ORDER if name in layer.sites):
        if can_fold(layer, name) and readers(layer, name) == (name,):
            weights = _split(layer, weights, name, statistics, spec)
    sites = dict(weights.sites)
    for name, plan in layer.sites.items():
        if plan.order == "gathered" and sites[name].order is None:
            as_it_comes = torch.arange(plan.channels, device=sites[name].weight.device)
            sites[name] = replace(sites[name], order=as_it_comes)
    return replace(weights, sites=sites)


def _split(
    layer: LayerPlan,
    weights: FloatLayer,
    name: SiteName,
    statistics: Mapping[str, Tensor],
    spec: SplittingSpec,
) -> FloatLayer:
    found = search_parts(
        layer.sites[name],
        weights.sites[name].weight,
        statistics[f"absmax.{name}"],
        statistics[f"moments.{name}"],
        statistics[f"samples.{name}"],
        spec.largest_share,
    )
    weights = fold_division(layer, weights, name, found.parts.float())
    divided = weights.sites[name]
    assert divided.divided_by is not None
    # By how much a norm's weight is divided exactly depends on its dtype.
    exact = (divided.divided_by / found.parts)[found.order]
    columns = (found.columns * exact).to(divided.weight.dtype)
    sites = {**weights.sites, name: replace(divided, weight=columns, order=found.order)}
    return replace(weights, sites=fold_orders(layer, sites, {name: found.order}))


def search_parts(
    site: SitePlan,
    weight: Tensor,  # (N, K)
    absmax: Tensor,  # (K,)
    moment: Tensor,  # (K, K) X^T X
    samples: Tensor,  # (T, K) some inputs
    largest_share: float,
) -> Reassembly:
    """The reassembly whose rounded inputs give the nearest output of the samples.

    Leaving all channels whole is among those that are tried. Weights are not rounded.
    """
    assert site.input_spec is not None  # or the recipe would have been refused
    weight = weight.float()
    wanted = samples @ weight.t()
    best: Reassembly | None = None
    least = float("inf")
    for parts in candidate_parts(absmax, int(largest_share * site.channels)):
        tried = reassemble(weight, moment, parts)
        x = (samples / parts)[:, tried.order]
        made = quantize_rows(x, site.input_spec, x.dtype).dequantize() @ tried.columns.t()
        cost = float((made - wanted).square().sum())
        if best is None or cost < least:
            best, least = tried, cost
    assert best is not None
    return best


def candidate_parts(absmax: Tensor, most: int) -> Iterator[Tensor]:  # (K,) int64
    """Parts of the channels for one threshold after the other, first all whole.

    Ends with the threshold that would add more than `most` parts to the channels that there are.
    """
    last = torch.ones_like(absmax, dtype=torch.int64)
    yield last
    largest = absmax.max()
    if largest == 0:
        return
    for step in count(1):
        threshold = largest * 2.0 ** (-step / THRESHOLDS_PER_OCTAVE)
        parts = (absmax / threshold).ceil().clamp(min=1.0, max=most + 2).long()
        if int((parts - 1).sum()) > most:
            return
        if not torch.equal(parts, last):
            yield parts
        last = parts


def reassemble(
    weight: Tensor,  # (N, K) float32
    moment: Tensor,  # (K, K) X^T X
    parts: Tensor,  # (K,) int64
) -> Reassembly:
    """Split channels into parts, and merge the pairs of whole ones that cost least, K in all.

    Merging a into b costs |w_a|**2 * sum of (x_a - c x_b)**2, with c = x_a . x_b / x_b . x_b.
    """
    order = torch.arange(parts.numel(), device=parts.device)
    added = order.repeat_interleave(parts - 1)
    if not len(added):
        return Reassembly(parts, order, weight)
    whole = (parts == 1).nonzero().squeeze(1)
    power, norm = moment.diagonal(), weight.square().sum(dim=0)
    # Stable, so that equal channels keep their place.
    ascending = whole[(power * norm)[whole].argsort(stable=True)]
    few, many = ascending.tensor_split([len(whole) // 2])
    products = moment[few][:, many]
    share = products / power[many].clamp(min=torch.finfo(torch.float32).tiny)
    left = (power[few, None] - products * share).clamp(min=0)
    cost, nearest = (left * norm[few, None]).min(dim=1)
    merged = cost.argsort(stable=True)[: len(added)]
    gone, into = few[merged], nearest[merged]
    columns = weight.clone()
    # A product, because its sums have an order, which those of an indexed addition have not.
    takes = share[merged, into].unsqueeze(1) * torch.nn.functional.one_hot(into, len(many))
    columns[:, many] += weight[:, gone] @ takes
    order[gone.sort().values] = added
    return Reassembly(parts, order, columns[:, order])
