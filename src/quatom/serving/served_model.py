"""The engine of `quatom serve`, in this process or in one of its own."""

from typing import Any

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.recipe import Recipe
from quatom.serving.async_engine import AsyncEngine
from quatom.serving.engine_launch import EnginePlan, EngineProcess
from quatom.serving.process_engine import ProcessEngine
from quatom.serving.thread_engine import ThreadEngine


def build_engine(
    *,
    model: str | None,
    random_weights: str | None,
    recipe: dict[str, Any] | None,
    gpu_memory: float | None,
    device: str | None,
    dtype: str | None,
    limits: dict[str, Any],
) -> Engine:
    """An engine for a checkpoint or for random weights; every argument can be written as JSON.

    On a GPU, or with a memory budget, it has run every kind of step once, so that no request waits
    for kernels to compile.

    Args:
        model: folder, hub id or file.
        random_weights: name of a shape, instead of a model.
        recipe: of random weights, as `Recipe.to_dict` gives it.
        gpu_memory: GiB for everything.
        device: cpu or cuda; None: a GPU if there is one.
        dtype: float32, bfloat16 or float16; None: as `quatom.load` chooses.
        limits: fields of EngineConfig.

    Raises:
        QuatomError: there is no such model, or it does not fit.
    """
    from quatom.engine import startup
    from quatom.loading import load
    from quatom.placement import usable_device, usable_dtype

    config, number_type = EngineConfig(**limits), usable_dtype(dtype)
    where = usable_device(device)
    config.check_memory(where)
    place = str(where)
    if model is not None and random_weights is None and recipe is None:
        loaded = load(model, device=place, dtype=number_type)
    else:
        # What a benchmark runs; options that contradict each other are refused there.
        from quatom.benchmark.throughput_models import benchmark_models

        recipes = [] if recipe is None else [Recipe.from_dict(recipe)]
        _, loaded = next(
            benchmark_models(
                model,
                random_weights,
                recipes,
                device=place,
                dtype=number_type,
                num_layers=None,
                seed=0,
                gpu_memory=gpu_memory,
            )
        )
    if gpu_memory is None and loaded.device.type == "cpu":
        return Engine(loaded, config)
    return startup.build_engine(loaded, config, gpu_memory)


def start_engine(
    arguments: dict[str, Any], *, own_process: bool, restart: bool, log_level: str
) -> AsyncEngine:
    """Build an engine and what serves it.

    Args:
        arguments: of `build_engine`.
        own_process: run it in a process of its own, else in a thread of this one.
        restart: start the engine's process anew when it ends.
        log_level: of its process.

    Raises:
        QuatomError: as `build_engine`, in either place.
    """
    if not own_process:
        return ThreadEngine(build_engine(**arguments))
    plan = EnginePlan(
        factory=f"{__name__}:{build_engine.__name__}", arguments=arguments, log_level=log_level
    )
    process = EngineProcess(plan)
    process.wait_until_ready()
    try:
        tokenizer = _tokenizer(arguments["model"])
    except BaseException:
        process.close(0.0)
        raise
    return ProcessEngine(process, tokenizer, plan=plan if restart else None)


def _tokenizer(model: str | None) -> Any:
    """The same as the engine's; random weights have none."""
    if model is None:
        return None
    from quatom.checkpoint.reader import open_source
    from quatom.checkpoint.tokenizer import find_tokenizer

    return find_tokenizer(open_source(model))
