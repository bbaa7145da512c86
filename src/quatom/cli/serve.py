"""`quatom serve`: an OpenAI-compatible HTTP server for one model."""

import os
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Ask this key of every request; else QUATOM_API_KEY, else none."),
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
        int, typer.Option(min=1, help="Sequences that may queue; more get HTTP 429.")
    ] = 1024,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB of KV cache; default: what is free (1 GiB on a CPU)."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens a KV block.")] = 32,
    prefix_caching: Annotated[bool, typer.Option(help="Use known prefixes again.")] = True,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="How long requests may go on after SIGTERM.")
    ] = 60,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of activations: float32, bfloat16 or float16.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Serve a model over OpenAI's HTTP API, with a chat page at /."""
    from quatom.cli.common import read_dtype
    from quatom.engine.config import EngineConfig
    from quatom.engine.llm import LLM
    from quatom.serving.app import ServerOptions
    from quatom.serving.server import configure_logging, default_name, serve_engine

    configure_logging(log_level.upper())
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        kv_cache_memory=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
        block_size=block_size,
        prefix_caching=prefix_caching,
    )
    llm = LLM(model, device=device, dtype=read_dtype(dtype), config=config)
    options = ServerOptions(
        model_names=tuple(served_model_name or (default_name(model),)),
        api_key=api_key or os.environ.get("QUATOM_API_KEY") or None,
    )
    serve_engine(llm.engine, options, host=host, port=port, drain_seconds=drain_seconds)
