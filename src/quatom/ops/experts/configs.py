"""Which variant of the Hopper kernel multiplies a layer of experts.

How tokens are routed is not known when the kernel is launched. A cost is: the rounds in which the
GPU takes the tiles of an even routing, times the time of a tile, whose steps were measured once.
"""

import math
from dataclasses import replace
from functools import cache

from quatom.ops.groups_layout import TOKEN_PADDING
from quatom.ops.linear.configs import Config

_TILE_START = 1.0
"""Microseconds of a tile beside its steps: filling the ring, storing results."""
_INTEGER = (
    (0.151, Config(8, 1, ctas_per_sm=2)),
    (0.235, Config(32, 1, ctas_per_sm=2)),
    (0.330, Config(32, 1, ctas_per_sm=3)),
    (0.259, Config(64, 1, ctas_per_sm=2)),
    (0.406, Config(64, 1, ctas_per_sm=3)),
    (0.330, Config(80, 1, ctas_per_sm=2)),
    (0.370, Config(96, 1, ctas_per_sm=2)),
    (0.459, Config(80, 3)),
    (0.496, Config(96, 3)),
    (0.567, Config(112, 3)),
    (0.458, Config(128, 1, ctas_per_sm=2)),
    (0.587, Config(128, 3, parts=2)),
    (0.456, Config(144, 2)),
    (0.555, Config(192, 2, parts=2)),
    (0.750, Config(256, 2, parts=2)),
)
"""(microseconds of a step, that is of a unit of weights in each block of a tile, configuration):
medians over the shapes of Mixtral-8x7B and Qwen3-30B-A3B with 1 to 4096 tokens on an H200."""
_GROUPED = (
    (0.30, Config(8, 1, ctas_per_sm=3)),
    (0.36, Config(32, 1, ctas_per_sm=3)),
    (0.55, Config(64, 1, ctas_per_sm=3)),
    (0.51, Config(64, 3)),
    (0.71, Config(96, 3)),
    (0.63, Config(128, 2, signed=True)),
    (0.95, Config(128, 3, signed=True)),
    (1.12, Config(256, 2, parts=2, signed=True)),
)
"""The same for activations with a scale per group, after the times of dense layers on an H100."""


def _candidates(integer: bool) -> list[tuple[float, Config]]:
    table = _INTEGER if integer else _GROUPED
    return [(step, replace(config, integer=integer, experts=True)) for step, config in table]


CONFIGS = tuple(config for integer in (True, False) for _, config in _candidates(integer))
"""All that `choose_expert_config` returns."""


@cache
def choose_expert_config(
    positions: int,
    experts: int,
    row_blocks: int,
    units: int,
    sms: int,
    *,
    integer: bool,
    in_place: bool,
) -> Config:
    """The configuration of least cost.

    Args:
        positions: T k.
        experts: E.
        row_blocks: N / 64.
        units: of weights in a block's k-range.
        sms: multiprocessors of the GPU.
        integer: whether activations are INT8 under one scale per token.
        in_place: whether the tiles of an expert may begin up to 15 rows early.
    """

    def cost(candidate: tuple[float, Config]) -> float:
        step, config = candidate
        tiles = experts * expected_tiles(positions / experts, config.tokens, in_place=in_place)
        tiles *= -(-row_blocks // config.row_blocks)
        return math.ceil(tiles / (sms * config.ctas_per_sm)) * (units * step + _TILE_START)

    return min(_candidates(integer), key=cost)[1]


def expected_tiles(mean: float, tile_rows: int, *, in_place: bool) -> float:
    """Tiles of an expert that `mean` rows are routed to at random, on average.

    The sum over n of the probability of more than n tiles; rows are taken as normally distributed.
    """
    early = (TOKEN_PADDING - 1) / 2 if in_place else 0.0
    variance = mean + ((TOKEN_PADDING**2 - 1) / 12 if in_place else 0.0)
    tiles = probability = 1.0 - math.exp(-mean)
    more = 1
    while probability > 1e-6:
        beyond = (more * tile_rows + 0.5 - mean - early) / math.sqrt(2.0 * variance)
        probability = 0.5 * math.erfc(beyond)
        tiles += probability
        more += 1
    return tiles
