"""`quatom plan`: will a model fit a GPU, and how many sequences beside each other?"""

from typing import Annotated

import typer

from quatom.cli.options import MOST_GIB


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, hub id, GGUF, checkpoint, or random:SHAPE for a public size."
        ),
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Name of a GPU, such as H200; may be repeated. Default: all known."),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, max=MOST_GIB, help="Memory of a GPU in GiB, in place of a name."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset or JSON file; may be repeated. Default: fp16 and quatom-w4a8kv4, or the "
            "recipe of a checkpoint."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence, for the count.")] = 4096,
) -> None:
    """Compute weights, KV cache and sequences from config.json. Nothing is loaded."""
    from quatom.benchmark.memory_plan import GIB, GPUS, Gpu, find_gpu, plan_memory
    from quatom.benchmark.model_shapes import find_shape
    from quatom.checkpoint.reader import read_model_config
    from quatom.cli.common import print_table, read_recipe
    from quatom.presets import DEFAULT_RECIPE, PRESETS

    own = None
    if model.startswith("random:"):
        config = find_shape(model.removeprefix("random:"))
    else:
        config, own = read_model_config(model)
    chosen = [read_recipe(name) for name in recipe or ()]
    chosen = chosen or ([own] if own else [PRESETS["fp16"], PRESETS[DEFAULT_RECIPE]])
    if gpu_memory is not None:
        gpus = {f"{gpu_memory:g} GiB": Gpu(gpu_memory, False)}
    else:
        gpus = {name: find_gpu(name) for name in gpu or GPUS}
    rows = []
    for name, device in gpus.items():
        for r in chosen:
            found = plan_memory(config, r, device.memory_gib)
            rows.append(
                (
                    name if device.tested else f"{name} (not tested)",
                    r.name,
                    f"{found.weight_bytes / GIB:.2f}",
                    f"{found.kv_bytes_per_token / 1024:.1f}",
                    f"{found.kv_tokens:,}" if found.fits else "does not fit",
                    f"{found.sequences(length):,}",
                )
            )
    print_table(
        f"{model}: computed, not measured; 10 % of the memory is left for activations",
        (
            "GPU",
            "recipe",
            "weights (GiB)",
            "KV (KiB per token)",
            "cached tokens",
            f"sequences of {length}",
        ),
        rows,
    )
