"""`quatom bench serve`: a server under load."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.bench_options import (
    ConversationsOption,
    JsonOption,
    ModelArgument,
    RandomOption,
    make_workload,
    read_numbers,
)
from quatom.cli.options import MOST_GIB


def serve(
    model: ModelArgument = None,
    random_weights: RandomOption = None,
    url: Annotated[
        str | None, typer.Option(help="Address of a running server, instead of MODEL.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of random weights; with --url a name for tables.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.001, max=MOST_GIB, help="GiB that the server may take, all together."),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: number of users. A list: 1,8,64.")
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(help="Open loop: mean requests per second, Poisson arrivals. A list: 1,4."),
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated per request.")] = 512,
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of requests per load.")] = 256,
    client_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that send; default: half of the cores, at most 8."),
    ] = None,
    conversations: ConversationsOption = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one step, prompts and decodes.")
    ] = 2048,
    max_model_len: Annotated[
        int, typer.Option(min=1, help="Longest request, prompt and output.")
    ] = 2048,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens per KV block.")] = 32,
    api_key: Annotated[
        str | None, typer.Option(envvar="QUATOM_API_KEY", help="Key of the server at --url.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: the GPU if there is one, else the CPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    json: JsonOption = None,
) -> None:
    """Latencies of a server under load, closed loop and open loop, over HTTP with streaming."""
    from quatom.benchmark.http_load import Target
    from quatom.benchmark.serve import find_model, measure_serving
    from quatom.benchmark.server_process import serve_process
    from quatom.benchmark.serving_results import add_entries, read_entries, summary

    if sum(given is not None for given in (model, random_weights, url)) != 1:
        raise typer.BadParameter("give one of MODEL, --random-weights and --url")
    users = read_numbers(concurrency, "--concurrency", int)
    rates = read_numbers(request_rate, "--request-rate", float)
    if not users and not rates:
        raise typer.BadParameter("give --concurrency, --request-rate or both")
    if json is not None:
        read_entries(json)
    workload = make_workload(conversations, num_prompts, input_len, output_len, max_model_len, seed)
    options = {
        "--random-weights": random_weights,
        "--recipe": recipe,
        "--gpu-memory": gpu_memory,
        "--max-num-seqs": max_num_seqs,
        "--max-num-batched-tokens": max_num_batched_tokens,
        "--max-model-len": max_model_len,
        "--max-waiting": max(num_prompts, 1024),
        "--block-size": block_size,
        "--device": device,
        "--dtype": dtype,
    }
    words = [word for k, v in options.items() if v is not None for word in (k, str(v))]
    words += ["--no-prefix-caching", *([model] if model is not None else [])]
    with nullcontext(url) if url is not None else serve_process(words) as address:
        address = address.rstrip("/")
        target = Target(address, find_model(address, api_key), api_key)
        loads = [(n, None) for n in users] + [(None, rate) for rate in rates]
        for number, (n, rate) in enumerate(loads):
            entry = measure_serving(
                target,
                workload,
                model=random_weights or Path(model or target.model).name,
                recipe=recipe or _recipe_of(model, random_weights),
                gpu_memory=gpu_memory,
                concurrency=n,
                request_rate=rate,
                client_processes=client_processes,
                seed=seed + number,  # other prompts each time: none is found in a prefix cache
            )
            typer.echo(summary(entry))
            if json is not None:
                add_entries(json, [entry], None)


def _recipe_of(model: str | None, random_weights: str | None) -> str:
    """Name of the recipe that a server runs where no option says it."""
    if model is None:
        return "fp16" if random_weights is not None else "unknown"
    from quatom.checkpoint.reader import open_source

    recipe = open_source(model).recipe
    return "fp16" if recipe is None else recipe.name
