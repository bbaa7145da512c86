"""Which variant of the Hopper kernel multiplies a layer of experts."""

from dataclasses import replace
from functools import cache

from quatom.ops.linear.configs import Config

_INTEGER: tuple[tuple[float, Config], ...] = (
    (4, Config(8, 1, ctas_per_sm=4)),
    (10, Config(16, 1, ctas_per_sm=4)),
    (24, Config(32, 1, ctas_per_sm=3)),
    (64, Config(64, 1, ctas_per_sm=2)),
    (128, Config(96, 3)),
    (512, Config(128, 3, parts=2)),
    (float("inf"), Config(256, 2, parts=2)),
)
"""(mean rows per expert up to which a configuration is the choice, the configuration)."""
_GROUPED: tuple[tuple[float, Config], ...] = (
    (4, Config(8, 1, ctas_per_sm=4)),
    (10, Config(16, 1, ctas_per_sm=4)),
    (24, Config(32, 1, ctas_per_sm=3)),
    (64, Config(64, 1, ctas_per_sm=3)),
    (128, Config(96, 3)),
    (512, Config(128, 3, signed=True)),
    (float("inf"), Config(256, 2, parts=2, signed=True)),
)
"""The same for activations with a scale per group."""


def _for_experts(config: Config, integer: bool) -> Config:
    return replace(config, integer=integer, experts=True)


CONFIGS = tuple(
    _for_experts(config, integer)
    for integer, table in ((True, _INTEGER), (False, _GROUPED))
    for _, config in table
)
"""All that `choose_expert_config` returns."""


@cache
def choose_expert_config(positions: int, experts: int, integer: bool) -> Config:
    """The configuration for T k positions of E experts, whatever the routing."""
    table = _INTEGER if integer else _GROUPED
    return _for_experts(next(c for most, c in table if positions <= most * experts), integer)
