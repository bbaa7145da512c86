"""`quatom serve`: an OpenAI-compatible HTTP server for one model."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from quatom.cli.dialogue_options import (
    ChatTemplateOption,
    ReasoningFormatOption,
    ToolFormatOption,
    read_style,
)

if TYPE_CHECKING:
    import torch

    from quatom.engine.config import EngineConfig
    from quatom.engine.engine import Engine
    from quatom.loading import LoadedModel


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Random weights of this shape instead of MODEL, to measure speed."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe of random weights.")] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB for everything: weights, activations, graphs, KV cache."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that every request must have. Default: QUATOM_API_KEY, else none."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that requests use; may be repeated. Default: MODEL as given."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one step, prompt chunks and decodes.")
    ] = 2048,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's own limit.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait; further requests get HTTP 429.")
    ] = 1024,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB of KV cache; default: what is free (1 GiB on a CPU)."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per KV block.")] = 32,
    prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV cache of prompts with the same beginning.")
    ] = True,
    keep_freed_memory: Annotated[
        bool,
        typer.Option(
            "--keep-freed-memory",
            help="Keep freed memory in the process (mallopt): faster decoding on a CPU.",
        ),
    ] = False,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="Seconds that running requests may take after SIGTERM.")
    ] = 60,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: the GPU if there is one, else the CPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
    chat_template: ChatTemplateOption = None,
    tool_format: ToolFormatOption = None,
    reasoning_format: ReasoningFormatOption = "auto",
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Serve a model over OpenAI's HTTP API, with a chat page at /."""
    from quatom.cli.common import read_dtype
    from quatom.engine.config import EngineConfig
    from quatom.serving.app import ServerOptions
    from quatom.serving.server import configure_logging, serve_engine

    configure_logging(log_level.upper())
    style = read_style(chat_template, tool_format, reasoning_format)
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        kv_cache_memory=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
        block_size=block_size,
        prefix_caching=prefix_caching,
        keep_freed_memory=keep_freed_memory,
    )
    engine, name = serving_engine(
        model,
        config,
        random_weights=random_weights,
        recipe=recipe,
        gpu_memory=gpu_memory,
        device=device,
        dtype=read_dtype(dtype),
    )
    options = ServerOptions(
        model_names=tuple(served_model_name or (name,)),
        dialogue=style,
        api_key=api_key or os.environ.get("QUATOM_API_KEY") or None,
    )
    serve_engine(engine, options, host=host, port=port, drain_seconds=drain_seconds)


def serving_engine(
    model: str | None,
    config: "EngineConfig",
    *,
    random_weights: str | None,
    recipe: str | None,
    gpu_memory: float | None,
    device: str | None,
    dtype: "torch.dtype | None",
) -> "tuple[Engine, str]":
    """An engine for a checkpoint or for random weights, and the name that it is served under.

    On a GPU, or with a memory budget, it has run every kind of step once, so that no request waits
    for kernels to compile.
    """
    import torch

    from quatom.engine.engine import Engine
    from quatom.engine.startup import build_engine
    from quatom.loading import load
    from quatom.serving.server import default_name

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model is not None and random_weights is None and recipe is None:
        name, loaded = default_name(model), load(model, device=device, dtype=dtype)
    else:
        name, loaded = _random_model(
            model, random_weights, recipe, device=device, dtype=dtype, gpu_memory=gpu_memory
        )
    if gpu_memory is None and loaded.device.type == "cpu":
        return Engine(loaded, config), name
    return build_engine(loaded, config, gpu_memory), name


def _random_model(
    model: str | None,
    random_weights: str | None,
    recipe: str | None,
    *,
    device: str,
    dtype: "torch.dtype | None",
    gpu_memory: float | None,
) -> "tuple[str, LoadedModel]":
    """What a benchmark runs; options that contradict each other are refused there."""
    from quatom.benchmark.throughput_models import benchmark_models
    from quatom.cli.common import read_recipe

    return next(
        benchmark_models(
            model,
            random_weights,
            [] if recipe is None else [read_recipe(recipe)],
            device=device,
            dtype=dtype,
            num_layers=None,
            seed=0,
            gpu_memory=gpu_memory,
        )
    )
