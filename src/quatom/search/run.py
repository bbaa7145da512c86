"""A recipe whose formats differ by layer and site, for a budget of bits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from quatom.arguments import Size, checked
from quatom.checkpoint.reader import TensorSource, open_source
from quatom.errors import CalibrationError, CheckpointError, RecipeError, unknown
from quatom.ops.backend import Backend
from quatom.placement import default_dtype, usable_backend, usable_device, usable_dtype
from quatom.plan import ModelPlan, plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import read_tokens
from quatom.recipe import CalibrationSpec, GPTQSpec, Recipe
from quatom.search.knapsack import Choice, Chosen, Frontier
from quatom.search.merge import merge
from quatom.search.options import KINDS, Kind, Option, Place, mean_bits, places_of
from quatom.search.sensitivity import SensitivityWalk

CURVE_POINTS = 32
"""Of the curve of error over bits, at most."""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found."""

    base: ModelPlan
    """The base as it was measured: without tuning and without sweeps of descent."""
    plan: ModelPlan
    """The base with the chosen overrides."""
    kinds: tuple[Kind, ...]
    places: tuple[Place, ...]
    chosen: Chosen
    """The number of the option of each place; None: as in the base."""
    gains: tuple[tuple[float, ...], ...]
    """Nats per token, of every option of every place."""
    divergences: tuple[float, ...]
    """Nats per token, of every block of the base."""
    curve: tuple[tuple[float, float], ...]
    """(bits, nats per token) of the best choices for several budgets, from the base on."""
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """What was found."""
        return self.plan.recipe

    @property
    def divergence(self) -> float:
        """Expected KL divergence, nats per token: the blocks' sum less what was gained."""
        return sum(self.divergences) - sum(
            own[option]
            for own, option in zip(self.gains, self.chosen, strict=True)
            if option is not None
        )


@checked(but=("source", "base", "device", "dtype", "backend"))
def search_recipe(
    source: str | Path | TensorSource,
    bits: float,
    *,
    calibration: str | Path | Tensor,
    base: str = "quatom-w4a4kv4",
    kinds: Annotated[Sequence[Kind], Size(1)] = KINDS,
    outliers: bool = False,
    text: CalibrationSpec | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | Backend | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Searched:
    """Find formats per layer and site under which the mean of bits stays within a budget.

    Args:
        source: the floating-point model.
        bits: budget of the mean of the averages of `kinds`: see `quatom.search.options`.
        calibration: text to measure on, or its tokens, (sequences, length).
        base: name of the preset whose formats are raised.
        kinds: what may be raised.
        outliers: try twice as many outlier channels, too.
        text: how many sequences of how many tokens; None: 16 of 512. Of four sequences the last
            one measures errors, the others give statistics.
        device: where blocks are computed; None: the GPU if there is one, else the CPU.
        dtype: of the computation, as in `quantize_checkpoint`.
        backend: implementation of the operations; None picks by device.
        on_block: called with (blocks done, blocks in all).

    Raises:
        ArgumentError: an argument is of another kind than it says here.
        RecipeError: the base is unknown or leaves nothing to raise, or the budget is out of range.
        CalibrationError: the text is missing or too short.
        CheckpointError: the source is damaged, or quantized already.
        QuantizationError: a layer cannot be quantized.
    """
    started = time.perf_counter()
    place, asked = usable_device(device), usable_dtype(dtype)
    backend, kinds = usable_backend(backend), tuple(dict.fromkeys(kinds))
    opened = source if isinstance(source, TensorSource) else open_source(source)
    if opened.recipe is not None:
        raise CheckpointError(
            f"{opened.folder} is already quantized ({opened.recipe.name}); search on the "
            "floating-point model"
        )
    resolved = plan(opened.model_config, _base(base))
    places = places_of(resolved, kinds, outliers=outliers)
    budget = check_budget(resolved, kinds, places, bits)
    tokens = read_tokens(opened, text or default_text(), calibration)
    held_out = len(tokens) // 4
    if not held_out:
        raise CalibrationError(
            f"the search keeps a quarter of the sequences for measuring, and {len(tokens)} were "
            "given: give --num-samples 4 or more"
        )
    walk = SensitivityWalk(
        opened,
        resolved,
        device=place,
        dtype=asked or default_dtype(opened, place),
        backend=backend,
    )
    found = walk.measure(tokens, held_out, places, on_block)
    frontier = Frontier(
        [
            [Choice(option.cost, gain) for option, gain in zip(p.options, own, strict=True)]
            for p, own in zip(places, found.gains, strict=True)
        ]
    )
    chosen = frontier.options(frontier.position(budget))
    of = "" if tuple(kinds) == KINDS else f"-of-{'-'.join(kinds)}"
    recipe = replace(
        PRESETS[base],
        name=f"{base}-at-{bits:g}-bits{of}",
        overrides=merge(option.override for option in chosen_options(places, chosen)),
    )
    start, total = float(mean_bits(resolved, kinds)), sum(found.divergences)
    steps = {round(i * (len(frontier) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}
    return Searched(
        base=resolved,
        plan=plan(opened.model_config, recipe),
        kinds=tuple(kinds),
        places=places,
        chosen=chosen,
        gains=found.gains,
        divergences=found.divergences,
        curve=tuple(
            (start + float(frontier.cost(i)), total - frontier.gain(i)) for i in sorted(steps)
        ),
        seconds=time.perf_counter() - started,
    )


def default_text() -> CalibrationSpec:
    """What a search reads where nothing is said: a few thousand tokens."""
    return CalibrationSpec(num_samples=16, sequence_length=512)


def chosen_options(places: Sequence[Place], chosen: Chosen) -> list[Option]:
    """The options that were chosen."""
    return [p.options[i] for p, i in zip(places, chosen, strict=True) if i is not None]


def check_budget(
    resolved: ModelPlan, kinds: Sequence[Kind], places: Sequence[Place], bits: float
) -> Fraction:
    """What may be added to the base's bits.

    Raises:
        RecipeError: less than nothing, or more than all options take.
    """
    base = mean_bits(resolved, kinds)
    most = base + sum((max(o.cost for o in place.options) for place in places), Fraction(0))
    budget = Fraction(str(bits))
    if not base <= budget <= most:
        shown = ceil(base * 10**4) / 10**4, floor(most * 10**4) / 10**4  # as they may be given
        raise RecipeError(
            f"a budget of {bits:g} bits is out of range: {resolved.recipe.name} takes "
            f"{shown[0]:.4f}, the mean of {', '.join(kinds)}, and with everything raised "
            f"{shown[1]:.4f}; give --bits in between, or another --base or --raise"
        )
    return budget - base


def _base(name: str) -> Recipe:
    """A preset as it is measured."""
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(unknown("base", name, PRESETS))
    recipe = PRESETS[name]
    if not recipe.quantizes_weights:
        raise RecipeError(
            f"base {name!r} leaves the weights as they are: there is no checkpoint to make of it"
        )
    # Both take much of the time of quantizing, and lower all errors of a block in much the same
    # way: which places gain most can be seen without them.
    weights, rounder = recipe.weights, recipe.weights.rounder
    if isinstance(rounder, GPTQSpec):
        weights = replace(weights, rounder=replace(rounder, descent_sweeps=0))
    return replace(recipe, weights=weights, tuning=None)
