"""`quatom eval`: perplexity on a text, and zero-shot tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quatom.cli.options import DeviceOption

if TYPE_CHECKING:
    from quatom.evaluation.corpora import CorpusText
    from quatom.loading import LoadedModel


def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    perplexity: Annotated[
        Path | None,
        typer.Option(help="Text file to measure perplexity on, or wikitext2, ptb or c4."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Floating-point model to compare the predictions of each token with: agreement of "
            "the most probable tokens, and KL divergence."
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Number of windows to score; default: all.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks, separated by commas: piqa,arc_easy,...")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the data of tasks and corpora, to work offline."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples per task; default: all.")
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of tasks in one forward pass, and of sequences that are generated at "
            "once. More are faster on a GPU and take more memory.",
        ),
    ] = 4096,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps answers, so that an interrupted run continues; default: "
            "zeroshot in QUATOM_CACHE_DIR (~/.cache/quatom)."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Result file to write, or to add entries to.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the result file; default: the folder's.")
    ] = None,
) -> None:
    """Measure perplexity (GPTQ's protocol) and zero-shot accuracy."""
    from quatom.evaluation.corpora import read_corpus
    from quatom.evaluation.divergence import check_same_vocabulary
    from quatom.evaluation.results import read_results
    from quatom.evaluation.zero_shot import find_harness
    from quatom.loading import load

    if perplexity is None and tasks is None:
        raise typer.BadParameter("give --perplexity FILE, --tasks NAMES, or both")
    if reference is not None and perplexity is None:
        raise typer.BadParameter("--reference is compared with on a text: give --perplexity, too")
    if json is not None:
        read_results(json)
    corpus = None if perplexity is None else read_corpus(perplexity, data_dir=data_dir)
    if tasks is not None:
        find_harness()
    loaded = load(model, device=device, dtype=dtype)
    compared = None
    if reference is not None:
        compared = load(reference, device=device, dtype=dtype)
        check_same_vocabulary(loaded, compared)
    title = name or Path(model).resolve().name
    if corpus is not None:
        _perplexity(loaded, compared, title, corpus, sequence_length, max_windows, json)
    if tasks is not None:
        _tasks(loaded, title, tasks.split(","), data_dir, limit, batch_tokens, cache, json)


def _perplexity(
    loaded: "LoadedModel",
    reference: "LoadedModel | None",
    title: str,
    text: "CorpusText",
    sequence_length: int,
    max_windows: int | None,
    out: Path | None,
) -> None:
    from quatom.cli.common import print_table, window_progress
    from quatom.evaluation.perplexity import measure_perplexity
    from quatom.evaluation.results import (
        accuracy_entry,
        add_results,
        comparable,
        read_results,
    )

    corpus = text.tokenized(loaded.require_tokenizer(), sequence_length)
    with window_progress(f"{title} on {corpus.name}") as on_window:
        measured = measure_perplexity(
            loaded,
            corpus.tokens,
            sequence_length=sequence_length,
            max_windows=max_windows,
            reference=reference,
            on_window=on_window,
        )
    entry = accuracy_entry(loaded, title, corpus.name, measured)
    shown = [entry]
    if out is not None:
        add_results(out, [entry])
        shown = comparable(read_results(out), entry)
    print_table(
        f"{title}, {corpus.name}, {measured.windows} windows of {sequence_length} tokens",
        ("recipe", "perplexity", "bits per weight", "bits per activation", "bits per KV value"),
        [
            (
                "float" if e["recipe"] == "fp16" else str(e["recipe"]),
                f"{e['perplexity']:.3f}",
                *(f"{e[f'bits_per_{part}']:.2f}" for part in ("weight", "activation", "kv")),
            )
            for e in shown
        ],
    )
    if (divergence := measured.divergence) is not None:
        top1, kl = divergence.same_top1_standard_error, divergence.kl_to_float_standard_error
        loss = divergence.loss_increase_standard_error
        print_table(
            f"{title} against {reference.source if reference else None}, ± one standard error",
            ("", "mean"),
            [
                ("same most probable token", _with_error(divergence.same_top1, top1)),
                ("KL divergence (nats)", _with_error(divergence.kl_to_float, kl)),
                ("increase of the loss (nats)", _with_error(divergence.loss_increase, loss)),
            ],
        )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _tasks(
    loaded: "LoadedModel",
    title: str,
    names: list[str],
    data_dir: Path | None,
    limit: int | None,
    batch_tokens: int,
    cache: Path | None,
    out: Path | None,
) -> None:
    from quatom.cli.common import print_table
    from quatom.evaluation.request_cache import default_cache_folder
    from quatom.evaluation.results import add_results
    from quatom.evaluation.zero_shot import evaluate_tasks

    entries = evaluate_tasks(
        loaded,
        names,
        data_dir=data_dir,
        limit=limit,
        batch_tokens=batch_tokens,
        cache=cache or default_cache_folder(),
        model_name=title,
    )
    print_table(
        f"{title}, {loaded.recipe.name}, zero-shot",
        ("task", "metric", "value ± standard error", "examples"),
        [
            (
                e["task"],
                e["metric"],
                _with_error(e["value"], e["standard_error"]),
                str(e["examples"]),
            )
            for e in entries
        ],
    )
    if out is not None:
        add_results(out, entries)
