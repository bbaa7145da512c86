"""Which variant of the Hopper kernel multiplies a layer of experts."""

from functools import cache

from quatom.ops.linear.configs import Config

_INTEGER = (
    (6, Config(8, 1, ctas_per_sm=4)),
    (12, Config(16, 1, ctas_per_sm=4)),
    (32, Config(32, 1, ctas_per_sm=3)),
    (64, Config(64, 1, ctas_per_sm=2)),
    (128, Config(96, 3)),
    (512, Config(128, 3, parts=2)),
    (None, Config(256, 2, parts=2)),
)
_GROUPED = (
    (6, Config(8, 1, ctas_per_sm=4)),
    (12, Config(16, 1, ctas_per_sm=4)),
    (32, Config(32, 1, ctas_per_sm=3)),
    (64, Config(64, 1, ctas_per_sm=3)),
    (128, Config(96, 3)),
    (512, Config(128, 3, signed=True)),
    (None, Config(256, 2, parts=2, signed=True)),
)
"""(mean rows per expert up to which it is chosen, configuration)."""


@cache
def choose_expert_config(
    positions: int, experts: int, row_blocks: int, units: int, integer: bool
) -> Config:
    """The configuration for T k positions of E experts; the routing is not known."""
    mean = positions / experts
    table = _INTEGER if integer else _GROUPED
    from dataclasses import replace

    found = next(config for most, config in table if most is None or mean <= most)
    return replace(found, integer=integer, experts=True)
