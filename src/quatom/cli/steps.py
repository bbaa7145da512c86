"""`quatom bench steps`: where the time of a decode and of a prefill step goes, on a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.options import MOST_GIB


def steps(
    random_weights: Annotated[str, typer.Option(help="Shape: llama-2-7b, llama-3-8b, ...")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe; may be repeated. Default: quatom-w4a4kv4.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences of the decode steps: 1,64,256.")] = "64",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 1024,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefill step.")] = 2048,
    kv_cache_memory: Annotated[
        float,
        typer.Option(min=0.001, max=MOST_GIB, help="GiB of KV cache; it must hold the batch."),
    ] = 16.0,
    json: Annotated[
        Path | None, typer.Option(help="Result file; entries of other measurements are kept.")
    ] = None,
) -> None:
    """Profile engine steps: each part's own time beside the least it could take."""
    from quatom.benchmark.environment import measure_ceilings
    from quatom.benchmark.random_weights import random_model
    from quatom.benchmark.roofline import Ceilings
    from quatom.benchmark.serving_results import add_entries, read_entries
    from quatom.benchmark.step_profile import profile_steps
    from quatom.cli.common import read_recipe
    from quatom.engine.startup import GIB, release_memory
    from quatom.placement import usable_device

    device = usable_device("cuda")
    if json is not None:
        read_entries(json)
    measured = measure_ceilings()
    for name in recipe or ["quatom-w4a4kv4"]:
        loaded = random_model(random_weights, read_recipe(name), device=device)
        entries = profile_steps(
            loaded,
            model=random_weights,
            batches=[int(size) for size in batch.split(",")],
            context=context,
            prefill_tokens=prefill_tokens,
            ceilings=Ceilings.from_environment(measured),
            kv_cache_memory=int(kv_cache_memory * GIB),
        )
        if json is not None:
            add_entries(json, entries, measured)
        del loaded
        release_memory()
