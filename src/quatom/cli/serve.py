"""`quatom serve`: an OpenAI-compatible HTTP server for one model."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.config_file import apply_config
from quatom.cli.dialogue_options import (
    ChatTemplateOption,
    ReasoningFormatOption,
    ToolFormatOption,
    read_style,
)
from quatom.cli.options import MOST_GIB


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
        typer.Option(
            min=0.001,
            max=MOST_GIB,
            help="GiB for everything: weights, activations, graphs, KV cache.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must carry; may be repeated, then any one of them."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of keys, one per line. Default: the key in QUATOM_API_KEY."),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate chain in PEM: serve HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Private key of the certificate.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may use this server, or * for all; may be repeated."),
    ] = None,
    keep_alive_seconds: Annotated[
        int,
        typer.Option(min=0, max=86_400, help="Seconds that an idle connection stays open."),
    ] = 75,
    drain_seconds: Annotated[
        int,
        typer.Option(
            min=0, max=86_400, help="Seconds that running requests may take after SIGTERM."
        ),
    ] = 60,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that requests use; may be repeated. Default: MODEL as given."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one step, prompts and decodes.")
    ] = 2048,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's own limit.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait; more get HTTP 429.")
    ] = 1024,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=MOST_GIB, help="GiB of KV cache; default: what is free (1 GiB on a CPU)."
        ),
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
    engine_process: Annotated[
        bool, typer.Option(help="Run the engine in a process of its own.")
    ] = True,
    restart_engine: Annotated[
        bool,
        typer.Option(help="Restart an engine that dies or hangs; else the server exits."),
    ] = False,
    hang_seconds: Annotated[
        float,
        typer.Option(help="Seconds without progress after which the engine hangs; 0: any time."),
    ] = 60.0,
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
    from quatom.cli.common import default_name
    from quatom.errors import ServerError
    from quatom.serving.connections import check_origins, open_listener, read_api_keys, read_tls
    from quatom.serving.hang_watch import check_bound
    from quatom.serving.logs import configure_logging

    # SIGTERM ends it while a model is loaded too, even as the first process of a container, to
    # which the system does nothing by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Everything that can be wrong without a model is found before minutes of loading one, and most
    # of it before seconds of importing what serves it.
    configure_logging(log_level)
    if model is not None and random_weights is None:
        name = default_name(model)
        if recipe is not None:
            raise ServerError(f"--recipe is for --random-weights: {model} has its own")
    elif model is None and random_weights is not None:
        from quatom.benchmark.model_shapes import find_shape

        name = random_weights
        find_shape(name)
    else:
        raise ServerError("give either MODEL or --random-weights SHAPE")
    if restart_engine and not engine_process:
        raise ServerError("--restart-engine needs the engine in a process of its own")
    if not all(served_model_name or (name,)):
        raise ServerError("--served-model-name is empty: give a name, or leave the option out")
    check_bound(hang_seconds)
    keys = read_api_keys(api_key, api_key_file, os.environ.get("QUATOM_API_KEY"))
    origins = check_origins(allowed_origins or ())
    tls = read_tls(ssl_certfile, ssl_keyfile)
    listener = open_listener(host, port)

    from dataclasses import asdict

    from quatom.cli.common import read_recipe
    from quatom.engine.config import EngineConfig
    from quatom.placement import usable_dtype
    from quatom.serving.app import ServerOptions
    from quatom.serving.served_model import start_engine
    from quatom.serving.server import Connections, serve_engine

    options = ServerOptions(
        model_names=tuple(served_model_name or (name,)),
        dialogue=read_style(chat_template, tool_format, reasoning_format),
        api_keys=keys,
        allowed_origins=origins,
        hang_seconds=hang_seconds,
    )
    limits = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        kv_cache_memory=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
        block_size=block_size,
        prefix_caching=prefix_caching,
        keep_freed_memory=keep_freed_memory,
    )
    usable_dtype(dtype)
    arguments = {
        "model": model,
        "random_weights": random_weights,
        "recipe": None if recipe is None else read_recipe(recipe).to_dict(),
        "gpu_memory": gpu_memory,
        "device": device,
        "dtype": dtype,
        "limits": asdict(limits),
    }
    connections = Connections(
        tls=tls,
        listener=listener,
        keep_alive_seconds=keep_alive_seconds,
        drain_seconds=drain_seconds,
    )
    engine = start_engine(
        arguments, own_process=engine_process, restart=restart_engine, log_level=log_level
    )
    serve_engine(engine, options, connections)
