"""Tiny Quatom checkpoints, made on the spot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import OutlierSpec, Recipe
from tests.conftest import LLAMA, make_model
from tests.families.models import save_tiny

TWO_BLOCKS = LLAMA | {"intermediate_size": 768}
"""Sizes that divide into two tensor-parallel blocks of groups of 32."""


def tiny_recipe(name: str, *, tensor_parallel: int = 1) -> Recipe:
    """A preset that calibrates in a second; with groups of 32 where blocks are small."""
    recipe = PRESETS[name]
    calibration = replace(recipe.calibration, num_samples=4, sequence_length=64)
    recipe = replace(recipe, calibration=calibration, tensor_parallel=tensor_parallel)
    if tensor_parallel == 1:
        return recipe
    specs = recipe.weights, recipe.activations
    weights, activations = (s if s.group_size == -1 else replace(s, group_size=32) for s in specs)
    return replace(recipe, weights=weights, activations=activations)


def tiny_checkpoint(folder: Path, source: Path, recipe: Recipe, text: Path) -> Path:
    """The checkpoint of a recipe, made once per folder."""
    target = folder / f"{source.name}-{recipe.name}-{recipe.tensor_parallel}"
    if not target.exists():
        quantize_checkpoint(source, target, recipe, calibration=text)
    return target


def two_block_model(folder: Path) -> Path:
    """A Llama that `tiny_recipe(..., tensor_parallel=2)` fits."""
    return make_model(folder / "two-blocks", TWO_BLOCKS)


IN_VLLM: dict[str, dict[str, Any]] = {
    "ernie4_5": {"use_bias": False},  # vLLM's model has no biases, nor have the released ones
    "glm4_moe": {"use_qk_norm": False},  # as GLM-4.5-Air: the plugin refuses the norms of GLM-4.5
}
"""What differs from `tests.families.models` where vLLM runs it."""


def family_checkpoint(folder: Path, family: str, name: str, text: Path) -> Path:
    """A checkpoint of one of `tests.families.models`."""
    source = folder / family
    if not source.exists():
        save_tiny(source, family, **IN_VLLM.get(family, {}))
    return tiny_checkpoint(folder, source, family_recipe(name), text)


def family_recipe(name: str) -> Recipe:
    """A preset for the sizes of `tests.families.models`, which want groups of 32."""
    recipe = tiny_recipe(name)
    sizes = {
        part: replace(spec, group_size=32)
        for part in ("weights", "activations")
        if (spec := getattr(recipe, part)).group_size != -1
    }
    outliers = OutlierSpec(channels=32 if recipe.outliers.channels else 0)
    return replace(recipe, **sizes, outliers=outliers)
