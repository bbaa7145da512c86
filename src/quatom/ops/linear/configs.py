"""Configurations of the Hopper kernel of `linear`, and which one a problem gets."""

import json
import logging
import math
import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from quatom.ops.groups_layout import GROUP_BYTES, TOKEN_PADDING
from quatom.ops.linear.hopper_layout import UNIT_BYTES

_SHARED_BYTES = 227 * 1024
"""Shared memory that one CTA may have on Hopper."""
_RESERVED_BYTES = 1024
"""Shared memory of an SM that the system takes from each resident CTA."""
_STREAMED_TOKENS = 64
"""Tokens of a tile up to which a layer is bound by its weights."""
_EARLY_STAGES = 8

_log = logging.getLogger(__name__)

TUNINGS = {"H100": "tuning-h100.json", "H200": "tuning-h200.json"}
"""Tables of this package, by a word of the name of the GPU that they were measured on by
`python -m quatom.benchmark.tune_linear`."""
_OTHERS = "H100"
"""Whose table any other Hopper GPU gets."""


@dataclass(frozen=True, slots=True)
class Config:
    """A compiled variant of the kernel; docs/lab/kernels-linear.md says what each number does."""

    tokens: int
    """BM: tokens of a tile."""
    warpgroups: int
    """Consumer warpgroups."""
    blocks: int = 1
    """Blocks of 64 output channels of each warpgroup."""
    split: int = 1
    """CTAs that share a tile's k-range."""
    ctas_per_sm: int = 1
    parts: int = 1
    """Parts in which a step's tokens are multiplied and promoted."""
    signed: bool = False
    """Weights become signed numbers, instead of sums corrected for their offset."""
    integer: bool = False
    """INT8 activations and weights that carry their group's multiple, summed in int32."""
    experts: bool = False
    """Runs of tokens multiplied by the weights of their experts (`quatom.ops.experts`)."""

    @property
    def columns(self) -> int:
        """Tokens of one matrix instruction."""
        return self.tokens // self.parts

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 output channels of a tile."""
        return self.warpgroups * self.blocks

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: activations, weights, activation scales, two barriers."""
        scales = 8 * max(self.tokens, TOKEN_PADDING)
        return self.tokens * GROUP_BYTES + scales + self.row_blocks * UNIT_BYTES + 16

    @property
    def receive_bytes(self) -> int:
        """Shared memory for the partial sums of the other CTAs of a cluster that splits k."""
        owned_blocks = -(-(self.tokens // 8) // self.split) if self.split > 1 else 0
        return owned_blocks * (self.split - 1) * self.row_blocks * 2048 + 8

    @property
    def num_stages(self) -> int:
        """Stages of the ring, units in flight: as many as fit."""
        room = (_SHARED_BYTES + _RESERVED_BYTES) // self.ctas_per_sm - _RESERVED_BYTES
        return min((room - self.receive_bytes) // self.stage_bytes, 32)

    @property
    def early_stages(self) -> int:
        """Stages whose weights are fetched before the input is there.

        What more is on its way then delays the kernel that makes the input.
        """
        return min(self.num_stages, _EARLY_STAGES) if self.streams else self.num_stages

    @property
    def streams(self) -> bool:
        """Whether weights may leave the L2 cache first: few tokens are one tile of them."""
        return self.tokens <= _STREAMED_TOKENS and not self.experts

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.num_stages * self.stage_bytes + self.receive_bytes

    @property
    def producer_threads(self) -> int:
        """A whole warpgroup where registers are handed from the producer to the consumers."""
        return 128 if self.ctas_per_sm == 1 and self.warpgroups > 1 else 32

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer and a consumer thread; zeros where all have the same number.

        setmaxnreg can only hand around what the launch gave the CTA, a multiple of 8 a thread:
        asking for one step more waits forever.
        """
        if self.producer_threads < 128:
            return 0, 0
        given = 65536 // self.threads // 8 * 8 * self.threads
        producer = 24 if self.warpgroups == 2 else 32
        if self.split > 1:  # a producer that starts amid the k-range remembers more
            producer = 40 if self.warpgroups == 2 else 56
        return producer, (given - producer * 128) // (128 * self.warpgroups) // 8 * 8

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups + self.producer_threads


_SPLITS = {1: (1, 2), 2: (1, 2, 3, 4), 3: (1, 2, 3, 5), 4: (1, 2, 4, 6, 8)}
"""Splits that are tried of integers, for each number of CTAs of an SM."""
_PAIR_SPLITS = {1: (1, 2, 3, 4, 8), 2: (1, 2, 4, 8)}
"""The same of CTAs with two warpgroups."""


def _candidates() -> tuple[Config, ...]:
    few = [
        Config(bm, 1, split=split, ctas_per_sm=ctas)
        for bm in (8, 16, 32, 64)
        for ctas in (3, 4)
        for split in (1, 2, 4, 5, 6)
        if bm < 64 or ctas == 3
    ]
    wide = [Config(64, 3, split=split) for split in (1, 2)]
    wide += [Config(96, 3, split=split) for split in (1, 2)]
    wide += [Config(64, 2, blocks=2, split=split) for split in (1, 2, 3)]
    wide += [Config(64, 3, blocks=2, parts=2), Config(128, 2)]
    grouped = [Config(128, 2, signed=True, split=split) for split in (1, 2, 3)]
    grouped += [Config(128, 3, signed=True), Config(256, 2, parts=2, signed=True)]
    grouped += [Config(96, 2, blocks=2), Config(128, 2, blocks=2, parts=2)]
    # Without sums to promote, more tokens a warpgroup and fewer CTAs pay.
    integer = [
        Config(bm, 1, split=split, ctas_per_sm=ctas)
        for bm in (8, 16, 32, 64)
        for ctas, splits in _SPLITS.items()
        for split in splits
        if bm < 64 or ctas < 4
    ]
    # Warpgroups of a CTA share its tokens: half or a third of the bytes from the L2 cache.
    integer += [Config(bm, 3, split=split) for bm in (8, 16, 32, 64) for split in (1, 2, 3, 4, 6)]
    integer += [
        Config(bm, 2, split=split, ctas_per_sm=ctas)
        for bm in (8, 16, 32, 64)
        for ctas, splits in _PAIR_SPLITS.items()
        for split in splits
        if bm < 64 or ctas == 1  # else registers spill
    ]
    integer += [Config(bm, 2, blocks=2, split=split) for bm in (32, 64) for split in (4, 8)]
    integer += [Config(64, 1, split=7, ctas_per_sm=3)]
    integer += [Config(32, 1, split=7, ctas_per_sm=4)]
    integer += [Config(128, 1, split=split, ctas_per_sm=2) for split in (1, 2, 3)]
    integer += [Config(128, 2, split=split) for split in (2, 3)]
    integer += [Config(128, 3, parts=2), Config(160, 3, parts=2)]
    integer += [Config(192, 2, parts=2), Config(256, 2, parts=2), Config(256, 1, parts=2)]
    return (
        *few,
        *wide,
        *grouped,
        *(replace(config, integer=True) for config in dict.fromkeys(few + wide + integer)),
    )


CONFIGS = _candidates()
"""What tuning chooses from."""


def read_tuning(gpu: str) -> str:
    """The table that was measured on a GPU of this name, as JSON."""
    if path := os.environ.get("QUATOM_LINEAR_TUNING"):
        return Path(path).read_text()
    known = next((word for word in TUNINGS if word in gpu.split()), None)
    if known is None:
        _log.info(
            "the linear kernel was never tuned on %s: it runs with the choices of an %s; measure "
            "them with python -m quatom.benchmark.tune_linear and set QUATOM_LINEAR_TUNING",
            gpu,
            _OTHERS,
        )
    return (files("quatom.ops.linear") / TUNINGS[known or _OTHERS]).read_text()


@cache
def _tuned(gpu: str) -> list[tuple[bool, int, int, int, Config]]:
    """Measured choices: (integer, row blocks, units, tokens, the fastest configuration)."""
    return [
        (
            row["integer"],
            row["row_blocks"],
            row["units"],
            row["tokens"],
            Config(**row["config"] | {"integer": row["integer"]}),
        )
        for row in json.loads(read_tuning(gpu))["choices"]
    ]


@cache
def choose_config(
    tokens: int, row_blocks: int, units: int, gpu: str, *, integer: bool = False
) -> Config:
    """The configuration for T tokens, N / 64 row blocks and a k-range of `units` units.

    The fastest one measured (`python -m quatom.benchmark.tune_linear`) on this GPU for the most
    similar problem: the same or the next larger number of tokens first, then the nearest shape. A
    GPU that has no table is logged, once.

    Args:
        gpu: the name that its driver gives it, "NVIDIA H200".
    """
    choices = [row[1:] for row in _tuned(gpu) if row[0] == integer]
    sizes = sorted({row[2] for row in choices})
    size = next((s for s in sizes if s >= tokens), sizes[-1])

    def distance(row: tuple[int, int, int, Config]) -> float:
        return abs(math.log(row[0] / row_blocks)) + 0.5 * abs(math.log(row[1] / units))

    best = min((row for row in choices if row[2] == size), key=distance)[3]
    return replace(best, split=min(best.split, units))
