"""The models that a benchmark runs, one after another in one process."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quatom.benchmark.model_shapes import find_shape
from quatom.benchmark.random_weights import random_model
from quatom.checkpoint.schema import bits_per_weight
from quatom.engine.startup import GIB
from quatom.errors import EngineError, ModelError
from quatom.families.spec import ModelConfig
from quatom.loading import LoadedModel, load
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe


def benchmark_models(
    model: str | None,
    shape: str | None,
    recipes: Sequence[Recipe],
    *,
    device: str,
    dtype: torch.dtype | None,
    num_layers: int | None,
    seed: int,
    gpu_memory: float | None,
) -> Iterator[tuple[str, LoadedModel]]:
    """Each model with the name that result files call it by; made when it is asked for.

    The caller drops a model before asking for the next, so that only one takes memory.

    Raises:
        ModelError: not exactly one of model and shape is given, or recipes or layers for a model.
        EngineError: weights alone are larger than the budget.
    """
    if (model is None) == (shape is None):
        raise ModelError("give either MODEL or --random-weights SHAPE")
    if model is not None:
        if recipes or num_layers is not None:
            raise ModelError(f"--recipe and --layers are for --random-weights: {model} has its own")
        yield Path(model).name, load(model, device=device, dtype=dtype)
        return
    assert shape is not None
    config = find_shape(shape)
    for recipe in recipes or (PRESETS["fp16"],):
        if gpu_memory is not None:
            check_weights_fit(shape, config, recipe, gpu_memory)
        name = shape if num_layers is None else f"{shape}, {num_layers} layers"
        yield (
            name,
            random_model(
                shape, recipe, device=device, dtype=dtype, seed=seed, num_layers=num_layers
            ),
        )


def check_weights_fit(name: str, config: ModelConfig, recipe: Recipe, gpu_memory: float) -> None:
    """Refuse a model that cannot fit before it is made.

    Raises:
        EngineError: its weights alone are larger than `gpu_memory` GiB.
    """
    resolved = plan(config, recipe)
    linears = resolved.num_weights * bits_per_weight(resolved) / 8
    outer = 2 * config.vocab_size * config.hidden_size  # embedding and head, two bytes each
    needed = (linears + 2 * outer) / GIB
    if needed > gpu_memory:
        raise EngineError(
            f"the weights of {name} as {recipe.name} take {needed:.1f} GiB, the budget is "
            f"{gpu_memory:g} GiB: raise --gpu-memory or choose a smaller recipe"
        )
