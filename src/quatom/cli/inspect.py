"""`quatom inspect`: what a checkpoint holds, or where a float model's activation outliers are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quatom.checkpoint.reader import TensorSource


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    layer: Annotated[
        int | None, typer.Option(help="One block; outliers are measured in block 0 by default.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to measure outliers on; default: Python's documentation topics."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the outliers to write.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Show a checkpoint's recipe, bits and sizes, or a model's activation outliers."""
    from quatom.checkpoint.reader import open_source
    from quatom.cli.common import check_output

    check_output(json)
    check_output(plot)
    source = open_source(model)
    if source.recipe is None:
        found = _inspect_float(source, layer or 0, text, plot)
    else:
        if plot is not None or text is not None:
            raise typer.BadParameter(
                "--plot and --text measure activation outliers, which a floating-point model has; "
                f"{model} is quantized"
            )
        found = _inspect_checkpoint(source, layer)
    if json is not None:
        from json import dumps

        json.write_text(dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _inspect_checkpoint(source: "TensorSource", layer: int | None) -> dict[str, Any]:
    from quatom.checkpoint.schema import (
        bits_by_linear,
        bits_per_activation,
        bits_per_kv,
        bits_per_weight,
    )
    from quatom.cli.common import print_table
    from quatom.cli.formats import print_formats
    from quatom.errors import ModelError
    from quatom.plan import plan

    recipe, config = source.recipe, source.model_config
    assert recipe is not None
    resolved = plan(config, recipe)
    if layer is not None and not 0 <= layer < config.num_layers:
        raise ModelError(
            f"layer {layer} does not exist: the model has 0 to {config.num_layers - 1}"
        )
    dtype = source.dtype(config.embedding_name)
    by_layer = bits_by_linear(resolved, dtype)
    # Without --layer, block 0 stands for all that no override is for.
    prefix = resolved.layers[layer or 0].prefix
    files = sorted(source.folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    found = {
        "recipe": recipe.to_dict(),
        "bits_per_weight": bits_per_weight(resolved, dtype),
        "bits_per_activation": bits_per_activation(resolved),
        "bits_per_kv": bits_per_kv(resolved),
        "layer_bits_per_weight": by_layer,
        "checkpoint_bytes": size,
        "files": {file.name: file.stat().st_size for file in files},
    }
    print_table(
        str(source.folder),
        ("", "value"),
        [
            ("recipe", recipe.name),
            ("family", f"{config.family}, {config.num_layers} blocks"),
            *((f"bits per {what}", f"{found[key]:.3f}") for what, key in _BITS.items()),
            ("tensor files", f"{len(files)}, {size / 1e6:.1f} MB"),
        ],
    )
    print_table(
        f"bits per weight in {prefix.removesuffix('.')}",
        ("linear", "bits"),
        [(n.removeprefix(prefix), f"{b:.3f}") for n, b in by_layer.items() if n.startswith(prefix)],
    )
    if recipe.overrides:
        print_formats(resolved)
    return found


_BITS = {
    "weight": "bits_per_weight",
    "activation": "bits_per_activation",
    "KV value": "bits_per_kv",
}


def _inspect_float(
    source: "TensorSource", layer: int, text: Path | None, plot: Path | None
) -> dict[str, Any]:
    from dataclasses import replace

    import torch

    from quatom.checkpoint.tokenizer import tokenizer_from_source
    from quatom.cli.common import print_table
    from quatom.quantize.calibration_data import (
        calibration_tokens,
        check_token_ids,
        documentation_text,
        sample_sequences,
    )
    from quatom.quantize.outliers import channel_magnitudes, plot_magnitudes
    from quatom.recipe import CalibrationSpec

    length = min(512, source.model_config.max_position)
    spec = replace(CalibrationSpec(), num_samples=8, sequence_length=length)
    tokenizer, vocab_size = tokenizer_from_source(source), source.model_config.vocab_size
    if text is None:
        tokens = sample_sequences(documentation_text(), tokenizer, spec)
        check_token_ids(tokens, vocab_size, "Python's documentation")
    else:
        tokens = calibration_tokens(text, tokenizer, spec, vocab_size)
    measured = channel_magnitudes(source, tokens, layer, torch.device("cpu"))
    title = f"{source.folder.name}, block {layer}, {tokens.numel()} tokens"
    if plot is not None:
        plot_magnitudes(measured, title, plot)
    print_table(
        title,
        ("input of", "channels", "largest |x|", "median channel's", "ratio"),
        [
            (
                m.site,
                str(m.absmax.numel()),
                f"{m.absmax.max():.3g}",
                f"{m.absmax.median():.3g}",
                f"{m.largest_over_median:.1f}",
            )
            for m in measured
        ],
    )
    return {
        "layer": layer,
        "tokens": tokens.numel(),
        "sites": {
            m.site: {
                "absmax": m.absmax.tolist(),
                "second_moment": m.second_moment.tolist(),
                "order": m.order.tolist(),
            }
            for m in measured
        },
    }
