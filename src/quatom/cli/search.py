"""`quatom search`: formats per layer and site for a budget of bits."""

from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.options import DeviceOption


def search(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or GGUF.")],
    bits: Annotated[
        float,
        typer.Option(
            help="Budget: the mean of bits per weight, bits per activation and bits per KV value, "
            "of those that --raise names. Scales and outliers count."
        ),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Text to measure on: a .txt file, .jsonl with text or messages, or a data set of "
            "the hub, ORGANIZATION/NAME[:CONFIGURATION[:SPLIT]]."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Recipe to write, a .json file.")],
    base: Annotated[str, typer.Option(help="Preset whose formats are raised.")] = "quatom-w4a4kv4",
    raised: Annotated[
        str,
        typer.Option("--raise", help="What may be raised, separated by commas."),
    ] = "weights,activations,kv_cache",
    outliers: Annotated[
        bool,
        typer.Option(
            help="Try twice as many outlier channels, too. The search takes twice as long then."
        ),
    ] = False,
    num_samples: Annotated[
        int,
        typer.Option(
            min=4, help="Number of sequences; a quarter of them measures errors, no statistics."
        ),
    ] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed that chooses the sequences.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number format of the computation: float32, bfloat16 or float16."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Result file: every option's bits and gain; quatom report draws it."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the result file; default: the folder's.")
    ] = None,
) -> None:
    """Find a recipe whose formats differ by layer and site, within a budget of bits."""
    from json import dumps

    from quatom.cli.common import check_output, print_table, rung_progress
    from quatom.cli.formats import print_formats
    from quatom.errors import RecipeError
    from quatom.evaluation.results import add_results, read_results
    from quatom.recipe import CalibrationSpec
    from quatom.search.options import read_kinds
    from quatom.search.output import bits_rows, recipe_file, search_entry
    from quatom.search.run import search_recipe

    if output.suffix != ".json":
        raise RecipeError(f"--output {output} must be a .json file, as quantize --recipe reads it")
    check_output(output)
    if json is not None:
        read_results(json)
    spec = CalibrationSpec(num_samples=num_samples, sequence_length=sequence_length, seed=seed)
    title = f"Searching above {base}, {num_samples} x {sequence_length} tokens"
    with rung_progress(title) as on_block:
        found = search_recipe(
            source,
            bits,
            calibration=calibration,
            base=base,
            kinds=read_kinds(raised),
            outliers=outliers,
            text=spec,
            device=device,
            dtype=dtype,
            on_block=on_block,
        )
    output.write_text(dumps(recipe_file(found), indent=2) + "\n", encoding="utf-8")
    if json is not None:
        text = {
            "corpus": calibration.name,
            "samples": num_samples,
            "sequence_length": sequence_length,
        }
        add_results(json, [search_entry(found, name or Path(source).resolve().name, text)])
    print_formats(found.plan)
    print_table(f"Wrote {output}", ("", base, "found"), bits_rows(found))
