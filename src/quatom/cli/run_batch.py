"""`quatom run-batch`: answer a file of requests in OpenAI's batch format."""

from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.dialogue_options import (
    ChatTemplateOption,
    ReasoningFormatOption,
    ToolFormatOption,
    read_style,
)
from quatom.cli.options import MOST_GIB


def run_batch(
    source: Annotated[Path, typer.Argument(help="JSONL of requests.", exists=True, dir_okay=False)],
    target: Annotated[
        Path, typer.Argument(help="JSONL of answers; a file with answers is continued.")
    ],
    model: Annotated[str, typer.Option(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name in the requests; may be repeated. Default: MODEL as given."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's own limit.")
    ] = None,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(min=0.001, max=MOST_GIB, help="GiB of KV cache; default: what is free."),
    ] = None,
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
) -> None:
    """Answer every request of a batch file. Run again, it answers what is missing or has failed."""
    import asyncio

    from rich.console import Console
    from rich.progress import Progress

    from quatom.cli.common import default_name
    from quatom.engine.config import EngineConfig
    from quatom.engine.llm import LLM
    from quatom.serving.app import ServerOptions, create_app
    from quatom.serving.batch_file import read_batch
    from quatom.serving.batch_output import check_output
    from quatom.serving.batch_run import run_batch as run

    style = read_style(chat_template, tool_format, reasoning_format)
    lines = read_batch(source)
    found = check_output(source, target, lines)
    app = None
    if found.waiting:
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(2048, 2 * max_num_seqs),
            max_model_len=max_model_len,
            kv_cache_memory=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
        )
        llm = LLM(model, device=device, dtype=dtype, config=config)
        names = tuple(served_model_name or (default_name(model),))
        app = create_app(
            llm.engine, ServerOptions(model_names=names, dialogue=style, hang_seconds=0)
        )
    with Progress(console=Console(stderr=True)) as bar:
        missing = len(found.waiting) + len(found.unnoted)
        task = bar.add_task("answering", total=len(lines), completed=len(lines) - missing)
        counts = asyncio.run(
            run(
                app,
                lines,
                target,
                concurrency=2 * max_num_seqs,
                on_answer=lambda _: bar.advance(task),
            )
        )
    typer.echo(
        f"{counts.completed} completed, {counts.failed} failed, {counts.skipped} answered before: "
        f"{target}"
    )
