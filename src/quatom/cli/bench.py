"""`quatom bench`: measurements on a GPU, as JSON with their environment."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure kernels on a GPU.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def attention(
    json: Annotated[Path | None, typer.Option(help="Result file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
) -> None:
    """Attention over the paged KV cache: batch x length x heads, beside torch's own."""
    from quatom.benchmark.attention import run_attention_benchmark

    run_attention_benchmark(json=json, plot=plot)


@app.command()
def kernels(
    op: Annotated[str, typer.Option(help="all, linear or quantize.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Result file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
) -> None:
    """Linear and quantize kernels: shapes x tokens, beside the peers found installed."""
    from quatom.benchmark.kernels import run_kernel_bench

    run_kernel_bench(op, json_path=json, plot_path=plot)
