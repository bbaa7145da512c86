"""`quatom warmup`: compile ahead every kernel that serving a model needs."""

import time
from typing import Annotated

import typer

from quatom.cli.options import DeviceOption


def warmup(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Random weights of this shape instead of MODEL: llama-2-7b, ..."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe of random weights.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of blocks of a random model.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
) -> None:
    """Compile the kernels of a model and keep them in QUATOM_CACHE_DIR."""
    from quatom.benchmark.throughput_models import benchmark_models
    from quatom.cli.common import read_recipe
    from quatom.engine.config import EngineConfig
    from quatom.engine.startup import build_engine
    from quatom.ops.cuda_build import cache_folder
    from quatom.placement import usable_device, usable_dtype

    models = benchmark_models(
        model,
        random_weights,
        [] if recipe is None else [read_recipe(recipe)],
        device=str(usable_device(device)),
        dtype=usable_dtype(dtype),
        num_layers=layers,
        seed=0,
        gpu_memory=None,
    )
    name, loaded = next(models)
    started = time.perf_counter()
    build_engine(loaded, EngineConfig(), None)
    seconds = time.perf_counter() - started
    kept = f", kernels are kept in {cache_folder()}" if loaded.device.type == "cuda" else ""
    typer.echo(f"ran every kind of step of {name} on {loaded.device} in {seconds:.1f} s{kept}")
