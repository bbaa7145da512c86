"""`quatom quantize`: a floating-point model in, a Quatom checkpoint out."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.options import DeviceOption
from quatom.presets import DEFAULT_RECIPE


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, hub id or GGUF; or random:llama-2-7b, random weights and "
            "tokens of that shape, to measure time and memory."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    recipe: Annotated[
        str, typer.Option(help="Preset name, or a JSON file with a recipe.")
    ] = DEFAULT_RECIPE,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure statistics on: a .txt file, .jsonl with text or messages, or a "
            "data set of the hub, ORGANIZATION/NAME[:CONFIGURATION[:SPLIT]]."
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Number of calibration sequences; default: the recipe's, 128 in the presets."
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per calibration sequence; default: the recipe's, 2048 in the presets."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed that chooses the sequences; default: the recipe's.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="GPUs over which vLLM may spread the checkpoint; divisors of this number work, "
            "too. Default: the recipe's, 1 in the presets."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number format of the computation: float32, bfloat16 or float16."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run of the same command.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Result file: time, memory and size of this run.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the result file; default: the folder's.")
    ] = None,
) -> None:
    """Quantize a model and write a packed checkpoint.

    Started by torchrun, all processes share the calibration text, one GPU each.
    """
    from quatom.quantize.ranks import process_group

    with process_group(device) as own_device:
        _quantize(
            source,
            target,
            recipe,
            calibration,
            {"num_samples": num_samples, "sequence_length": sequence_length, "seed": seed},
            tensor_parallel,
            own_device,
            dtype,
            resume,
            json,
            name,
        )


@contextmanager
def _told_if_interrupted(done: Callable[[], str], *, hidden: bool) -> Iterator[None]:
    """Say after Ctrl-C what is kept and how to go on; nothing where the work had not begun."""
    try:
        yield
    except KeyboardInterrupt:
        if done() and not hidden:
            typer.echo(f"quatom: kept {done()}; the same command with --resume goes on", err=True)
        raise


def _quantize(
    source: str,
    target: Path,
    recipe: str,
    calibration: Path | None,
    sampling: dict[str, int | None],
    tensor_parallel: int | None,
    device: str | None,
    dtype: str | None,
    resume: bool,
    json: Path | None,
    name: str | None,
) -> None:
    from torch import Tensor

    from quatom.benchmark.random_source import random_source, random_tokens
    from quatom.checkpoint.reader import TensorSource
    from quatom.cli.common import (
        block_progress,
        print_recipe,
        print_table,
        read_recipe,
    )
    from quatom.engine.host_memory import keep_freed_pages
    from quatom.evaluation.results import read_results
    from quatom.placement import usable_device
    from quatom.presets import PRESETS
    from quatom.quantize.pipeline import REPORT_FILE, quantize_checkpoint
    from quatom.quantize.ranks import Ranks
    from quatom.quantize.walk import QuantizedBlock
    from quatom.recipe_file import differences, find_recipe

    ranks = Ranks.current()
    with ranks.together():
        if json is not None and ranks.leads:
            read_results(json)
        chosen = read_recipe(recipe, **sampling)
        if tensor_parallel is not None:
            chosen = replace(chosen, tensor_parallel=tensor_parallel)
        _, base = find_recipe(recipe)
        base = PRESETS.get(recipe, base)
        if differences(chosen, base) and ranks.leads:
            print_recipe(chosen, base)
        opened: str | TensorSource = source
        tokens: Path | Tensor | None = calibration
        if source.startswith("random:"):
            if calibration is not None:
                raise typer.BadParameter("random weights read random tokens, no --calibration")
            opened = random_source(source.removeprefix("random:"), device=device)
            tokens = random_tokens(opened.model_config, chosen.calibration)
    if usable_device(device).type == "cpu":
        keep_freed_pages()
    started = time.perf_counter()
    text = chosen.calibration
    processes = f", {ranks.count} processes" if ranks.count > 1 else ""
    samples = f", {text.num_samples} x {text.sequence_length} tokens"
    what = f"Quantizing to {chosen.name}{samples if chosen.needs_calibration else ''}{processes}"
    notes: list[str] = []
    done = ""  # blocks that a resumed run need not do again
    with (
        _told_if_interrupted(lambda: done, hidden=not ranks.leads),
        block_progress(what, hidden=not ranks.leads) as (on_start, on_block),
    ):

        def begun(blocks: int, count: int) -> None:
            nonlocal done
            done = f"{blocks} of {count} blocks" if blocks else ""
            on_start(blocks, count)

        def finished(block: QuantizedBlock) -> None:
            nonlocal done
            done = f"{block.index + 1} of {block.num_blocks} blocks"
            on_block(block)
            if block.experts is not None:
                sentences = block.experts.sentences(text.min_expert_tokens)
                notes.extend(f"block {block.index}, {sentence}" for sentence in sentences)

        report = quantize_checkpoint(
            opened,
            target,
            chosen,
            calibration=tokens,
            device=device,
            dtype=dtype,
            resume=resume,
            on_start=begun,
            on_block=finished,
        )
    if not ranks.leads:
        return
    if notes:
        more = f"; {len(notes) - 1} more such experts in {REPORT_FILE}" if len(notes) > 1 else ""
        typer.echo(f"{notes[0]}{more}", err=True)
    if json is not None:
        from quatom.evaluation.results import add_results, quantize_entry

        seconds = time.perf_counter() - started
        title = name or Path(source).resolve().name
        add_results(json, [quantize_entry(report, title, seconds)])
    print_table(
        f"Wrote {report.target}",
        ("recipe", "bits per weight", "size (MB)"),
        [(chosen.name, f"{report.bits_per_weight:.3f}", f"{report.checkpoint_bytes / 1e6:.1f}")],
    )
