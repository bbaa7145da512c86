"""Factors of input channels by AWQ: powers of the mean magnitude, the power found by search.

Source: AWQ (Lin et al., MLSys 2024). The error is that of the site's own output on the calibration
inputs; the authors take that of the whole attention or feed-forward layer.
"""

import torch
from torch import Tensor

from quatom.numerics.rounding import round_to_nearest
from quatom.plan import SitePlan
from quatom.quantize.rounding import rounding_options

STEPS = 20
"""Powers that are tried, from 0 upwards."""


def search_factors(
    site: SitePlan,
    weight: Tensor,  # (N, K)
    magnitudes: Tensor,  # (K,) sums of |x|
    moment: Tensor,  # (K, K) X^T X
    largest_power: float,
) -> Tensor:  # (K,) float32
    """The factors m**a whose rounded weights err least, a below `largest_power`."""
    weight = weight.float()
    options = rounding_options(site, weight, clip_search="none")
    # Sums over tokens serve as means: a common factor is normalized away.
    magnitudes = torch.where(magnitudes > 0, magnitudes, magnitudes.mean().clamp(min=1.0))
    best, least = torch.ones_like(magnitudes), float("inf")
    for step in range(STEPS):
        factor = magnitudes.pow(largest_power * step / STEPS)
        factor = factor / (factor.max() * factor.min()).sqrt()
        rounded = round_to_nearest(weight * factor, site.layout, options).dequantize() / factor
        error = rounded - weight
        cost = float(((error @ moment) * error).sum())
        if cost < least:
            best, least = factor, cost
    return best
