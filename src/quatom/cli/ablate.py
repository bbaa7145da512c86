"""`quatom ablate`: what each part of a recipe is worth, rung by rung."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quatom.cli.options import DeviceOption

if TYPE_CHECKING:
    from torch import Tensor

    from quatom.recipe import Recipe


def _same(stored: dict[str, Any] | None, recipe: "Recipe | None") -> bool:
    """Whether a result's settings, maybe those of an older version, are a recipe."""
    from quatom.recipe import Recipe

    return (None if stored is None else Recipe.from_dict(stored)) == recipe


def ablate(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or GGUF.")],
    calibration: Annotated[Path, typer.Option(help="Plain-text file to measure statistics on.")],
    perplexity: Annotated[
        Path, typer.Option(help="Plain-text file to measure perplexity on, or a corpus name.")
    ],
    json: Annotated[Path, typer.Option(help="Result file; finished rungs in it are kept.")],
    ladder: Annotated[
        str,
        typer.Option(
            help="atom: the paper's seven rungs; quatom: what goes beyond them; keys: INT4 keys "
            "alone, all else in floating point; parts: what weights, activations and cache lose "
            "each; activations: formats of W4A8; prior-work: published methods beside these "
            "recipes."
        ),
    ] = "atom",
    rungs: Annotated[
        str | None,
        typer.Option(help="Only these rungs, separated by commas; float is one of them."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Number of windows to score; default: all.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    num_samples: Annotated[int, typer.Option(help="Number of calibration sequences.")] = 128,
    calibration_length: Annotated[
        int, typer.Option(help="Tokens per calibration sequence.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Seed that chooses the calibration sequences.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number format of the computation: float32, bfloat16 or float16."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the result file; default: the folder's.")
    ] = None,
) -> None:
    """Measure perplexity with each part of a recipe added to those before it."""
    from quatom.checkpoint.reader import open_source
    from quatom.checkpoint.tokenizer import tokenizer_from_source
    from quatom.cli.common import check_output, print_table, rung_progress
    from quatom.errors import RecipeError, unknown
    from quatom.evaluation.corpora import load_corpus
    from quatom.evaluation.ladder import LadderRun
    from quatom.evaluation.ladders import LADDERS
    from quatom.evaluation.perplexity import cut_windows
    from quatom.evaluation.results import add_results, read_results
    from quatom.placement import default_dtype, usable_device, usable_dtype
    from quatom.quantize.calibration_data import calibration_tokens, check_token_ids
    from quatom.recipe import CalibrationSpec, Recipe

    check_output(plot)
    if ladder not in LADDERS:
        raise RecipeError(unknown("ladder", ladder, LADDERS))
    steps: dict[str, Recipe | None] = {"float": None, **LADDERS[ladder]}
    chosen = list(steps) if rungs is None else rungs.split(",")
    if absent := [rung for rung in chosen if rung not in steps]:
        raise RecipeError(f"ladder {ladder} has no rung {absent[0]!r}; it has {', '.join(steps)}")
    opened = open_source(source)
    place = usable_device(device)
    tokenizer = tokenizer_from_source(opened)
    spec = CalibrationSpec(num_samples=num_samples, sequence_length=calibration_length, seed=seed)
    vocab_size = opened.model_config.vocab_size
    sequences = calibration_tokens(calibration, tokenizer, spec, vocab_size)
    corpus = load_corpus(perplexity, tokenizer, sequence_length=sequence_length)
    check_token_ids(corpus.tokens, vocab_size, corpus.name)
    windows = cut_windows(corpus.tokens, sequence_length, max_windows)
    run_hash = _hash(sequences, windows)
    model = name or Path(source).resolve().name
    done = {
        entry["rung"]: entry
        for entry in read_results(json)
        if entry.get("model") == model and entry.get("texts") == run_hash
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    for position, rung in enumerate(chosen):
        recipe = steps[rung]
        as_stored = None if recipe is None else recipe.to_dict()
        if rung in done and _same(done[rung]["settings"], recipe):
            continue
        with rung_progress(f"{position + 1} of {len(chosen)}: {rung}") as on_block:
            measured = LadderRun(
                opened,
                sequences,
                windows,
                device=place,
                dtype=usable_dtype(dtype) or default_dtype(opened, place),
                scores_file=json.with_name(f".{json.stem}-{run_hash}"),
                on_block=on_block,
            ).measure(rung, recipe)
        done[rung] = {
            "model": model,
            "ladder": ladder,
            "rung": rung,
            "corpus": corpus.name,
            "windows": len(windows),
            "sequence_length": sequence_length,
            "perplexity": measured.perplexity,
            "settings": as_stored,
            "calibration": f"{num_samples} x {calibration_length}, seed {seed}",
            "texts": run_hash,
        }
        add_results(json, [done[rung]])
    if done.keys() >= steps.keys():  # or another run may need what they share
        for file in json.parent.glob(f".{json.stem}-{run_hash}.*.safetensors"):
            file.unlink()
    print_table(
        f"{model}, {corpus.name}, {len(windows)} windows of {sequence_length} tokens",
        ("rung", "weights / activations / KV", "perplexity", "over float"),
        [_row(rung, steps[rung], done) for rung in chosen],
    )
    if plot is not None:
        _plot([done[rung] for rung in chosen], plot)


def _row(
    rung: str, recipe: "Recipe | None", done: dict[str, dict[str, Any]]
) -> tuple[str, str, str, str]:
    """A rung as it is printed; the increase where the float model was measured, too."""
    from quatom.evaluation.ladders import formats_of

    value, base = done[rung]["perplexity"], done.get("float", {}).get("perplexity")
    formats = "" if recipe is None else formats_of(recipe)
    over = "" if recipe is None or base is None else f"{value - base:+.2f}"
    return rung, formats, f"{value:.2f}", over


def _hash(*tokens: "Tensor") -> str:
    import hashlib

    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tokens)).hexdigest()[:16]


def _limits(values: list[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis: the smallest bar has a length, the largest room for its label."""
    low, high = min(values) * 0.9, max(values) * 1.1
    return low, high * (high / low) ** 0.15


def _plot(entries: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [entry["rung"] for entry in entries]
    values = [entry["perplexity"] for entry in entries]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2))
    bars = axis.barh(names, values, color="#4878a8")
    axis.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3)
    axis.axvline(values[0], color="grey", linewidth=0.8)
    axis.set_xscale("log")  # the first rung is orders of magnitude above the rest
    axis.set_xlim(*_limits(values))
    axis.invert_yaxis()
    axis.set_xlabel(f"perplexity on {entries[0]['corpus']} (log scale)")
    axis.set_title(entries[0]["model"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
