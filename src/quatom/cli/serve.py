"""`quatom serve`: an OpenAI-compatible HTTP server for one model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quatom.cli.config_file import apply_config

if TYPE_CHECKING:
    import torch

    from quatom.engine.config import EngineConfig
    from quatom.engine.engine import Engine


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=apply_config,
            is_eager=True,
            metavar="FILE",
            help="YAML or TOML file of these options by name; the command line wins.",
        ),
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
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must have one of; may be repeated."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of such keys, one on each line. Default: QUATOM_API_KEY, if set."),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate chain in PEM: serve HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key in PEM.")] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may use this server, or * for all; may be repeated."),
    ] = None,
    keep_alive_seconds: Annotated[
        int, typer.Option(min=0, help="How long an idle connection stays open.")
    ] = 75,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="How long requests may go on after SIGTERM.")
    ] = 60,
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
        int, typer.Option(min=1, help="Sequences that may queue; more get HTTP 429.")
    ] = 1024,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB of KV cache; default: what is free (1 GiB on a CPU)."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens of one KV block.")] = 32,
    prefix_caching: Annotated[bool, typer.Option(help="Use known prefixes again.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of activations: float32, bfloat16 or float16.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Serve a model over OpenAI's HTTP API, with a chat page at /."""
    from quatom.cli.common import read_dtype
    from quatom.engine.config import EngineConfig
    from quatom.serving.app import ServerOptions
    from quatom.serving.connections import check_origins, open_listener, read_api_keys, read_tls
    from quatom.serving.logs import configure_logging
    from quatom.serving.server import Connections, serve_engine

    configure_logging(log_level)
    # Everything that can be wrong without a model is found before minutes of loading one.
    api_keys = read_api_keys(api_key, api_key_file, os.environ.get("QUATOM_API_KEY"))
    origins = check_origins(allowed_origins or ())
    limits = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        kv_cache_memory=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
        block_size=block_size,
        prefix_caching=prefix_caching,
    )
    connections = Connections(
        tls=read_tls(ssl_certfile, ssl_keyfile),
        listener=open_listener(host, port),
        keep_alive_seconds=keep_alive_seconds,
        drain_seconds=drain_seconds,
    )
    engine, name = serving_engine(
        model,
        limits,
        random_weights=random_weights,
        recipe=recipe,
        gpu_memory=gpu_memory,
        device=device,
        dtype=read_dtype(dtype),
    )
    options = ServerOptions(
        model_names=tuple(served_model_name or (name,)),
        api_keys=api_keys,
        allowed_origins=origins,
    )
    serve_engine(engine, options, connections)


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

    from quatom.benchmark.memory_budget import build_engine
    from quatom.benchmark.throughput_models import benchmark_models
    from quatom.cli.common import read_recipe
    from quatom.engine.engine import Engine
    from quatom.serving.server import default_name

    models = benchmark_models(
        model,
        random_weights,
        [] if recipe is None else [read_recipe(recipe)],
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
        num_layers=None,
        seed=0,
        gpu_memory=gpu_memory,
    )
    name, loaded = next(models)
    if gpu_memory is None and loaded.device.type == "cpu":
        engine = Engine(loaded, config)
    else:
        engine = build_engine(loaded, config, gpu_memory)
    return engine, name if model is None else default_name(model)
