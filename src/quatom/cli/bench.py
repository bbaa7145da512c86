"""`quatom bench`: measurements as JSON with their environment."""

from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.bench_options import (
    ConversationsOption,
    JsonOption,
    ModelArgument,
    RandomOption,
    default_device,
    make_workload,
    read_batches,
    read_ceilings,
)
from quatom.cli.bench_serve import serve
from quatom.cli.options import MOST_GIB

app = typer.Typer(
    help="Measure kernels, and a whole model under load.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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
    op: Annotated[str, typer.Option(help="Operations: all, linear, quantize or experts.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Result file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
) -> None:
    """Linear, expert and quantize kernels: shapes x tokens, beside the peers found installed."""
    from quatom.benchmark.kernels import run_kernel_bench

    run_kernel_bench(op, json_path=json, plot_path=plot)


@app.command()
def throughput(
    model: ModelArgument = None,
    random_weights: RandomOption = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Recipe of random weights; may be repeated. Default: fp16."),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=MOST_GIB,
            help="GiB for everything: weights, activations, graphs, KV cache.",
        ),
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated per request.")] = 512,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Number of requests; all arrive at once.")
    ] = 256,
    conversations: ConversationsOption = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Steady decoding at these batch sizes over --input-len cached tokens instead of "
            "a run: 1,8,32,max; max is what fits."
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one step, prompts and decodes.")
    ] = 2048,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per KV block.")] = 32,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of blocks of a random model, for trials; default: all."),
    ] = None,
    ceilings: Annotated[
        str | None,
        typer.Option(help="TB/s of a copy, BF16 and 8-bit TFLOPS, for the limit; else measured."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: the GPU if there is one, else the CPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights and prompts.")] = 0,
    json: JsonOption = None,
) -> None:
    """Tokens per second of an engine in this process, with latencies and the share of the limit."""
    from quatom.benchmark.serving_results import add_entries, read_entries, summary
    from quatom.benchmark.throughput import Setting, measure_fixed_batches, measure_throughput
    from quatom.benchmark.throughput_models import benchmark_models
    from quatom.cli.common import read_recipe
    from quatom.engine.config import EngineConfig
    from quatom.engine.startup import release_memory
    from quatom.placement import usable_dtype

    device = device or default_device()
    if json is not None:
        read_entries(json)  # a file that cannot be merged into is found before the measurement
    limits, measured = read_ceilings(ceilings, device)
    models = benchmark_models(
        model,
        random_weights,
        [read_recipe(name) for name in recipe or ()],
        device=device,
        dtype=usable_dtype(dtype),
        num_layers=layers,
        seed=seed,
        gpu_memory=gpu_memory,
    )
    for name, loaded in models:
        setting = Setting(
            loaded=loaded,
            model=name,
            gpu_memory=gpu_memory,
            config=EngineConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
            ),
            ceilings=limits,
        )
        if batch is not None:
            entries = measure_fixed_batches(setting, read_batches(batch), input_len, seed=seed)
        else:
            longest = loaded.config.max_position
            workload = make_workload(
                conversations, num_prompts, input_len, output_len, longest, seed
            )
            entries = [measure_throughput(setting, workload, seed)]
        for entry in entries:
            typer.echo(summary(entry))
        if json is not None:
            add_entries(json, entries, measured)
        del loaded, setting
        release_memory()


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="A serving-GPU.json.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where pictures go; default: beside the file.")
    ] = None,
) -> None:
    """Draw serving results: by batch at equal batch and at equal memory, and over time."""
    from json import loads

    from quatom.benchmark.serving_plot import plot_file
    from quatom.benchmark.serving_results import read_entries

    entries = read_entries(results)
    if not entries:
        raise typer.BadParameter(f"{results} holds no results", param_hint="RESULTS")
    environment = loads(results.read_text(encoding="utf-8"))["environment"]
    for path in plot_file(entries, environment, folder or results.parent, results.stem):
        typer.echo(path)


app.command()(serve)
