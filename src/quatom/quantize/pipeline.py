"""Quantize a whole model: a Hugging Face folder in, a Quatom checkpoint out.

The target appears at the end, in one rename. Until then finished blocks, and the hidden states
after one of the last of them, lie in a working folder beside it, from which `resume` goes on.

Where torch.distributed runs (torchrun), all its processes call `quantize_checkpoint` alike. They
share the calibration sequences, the first one writes, and the bytes are those of one process.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quatom.arguments import checked, shown
from quatom.checkpoint.reader import TensorSource, open_source
from quatom.checkpoint.schema import bits_per_weight
from quatom.checkpoint.tokenizer import find_tokenizer, tokenizer_from_source
from quatom.checkpoint.writer import CheckpointWriter, check_target
from quatom.errors import CalibrationError, RecipeError, unknown
from quatom.ops.backend import Backend
from quatom.placement import default_dtype, usable_backend, usable_device, usable_dtype
from quatom.plan import ModelPlan, plan
from quatom.presets import DEFAULT_RECIPE, PRESETS
from quatom.quantize.block_log import BlockLog
from quatom.quantize.calibration_data import calibration_tokens, check_token_ids, check_tokens
from quatom.quantize.lanes import Share
from quatom.quantize.ranks import Ranks
from quatom.quantize.targets import check_targets
from quatom.quantize.tuning.tune import check_tuning
from quatom.quantize.walk import BlockQuantizer, QuantizedBlock, Streams, embed
from quatom.recipe import CalibrationSpec, Recipe

_log = logging.getLogger(__name__)
REPORT_FILE = "quatom_report.json"
"""File of a checkpoint that says what quantizing each block cost."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What `quantize_checkpoint` made."""

    target: Path
    recipe: Recipe
    bits_per_weight: float
    """Stored bits of each quantized weight, scales, outliers and orders counted."""
    checkpoint_bytes: int
    """Size of all tensor files, embeddings and norms included."""


@checked(but=("source", "recipe", "device", "dtype", "backend"))
@torch.no_grad()
def quantize_checkpoint(
    source: str | Path | TensorSource,
    target: str | Path,
    recipe: Recipe | str = DEFAULT_RECIPE,
    *,
    calibration: str | Path | Tensor | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | Backend | None = None,
    resume: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_block: Callable[[QuantizedBlock], None] | None = None,
) -> QuantizeReport:
    """Quantize the decoder of a model and write a checkpoint.

    Args:
        source: Hugging Face folder, hub id or GGUF of a floating-point model, or one opened.
        target: folder to write; it must not exist.
        recipe: a `Recipe`, or the name of one of `PRESETS`.
        calibration: a text as `calibration_tokens` reads it, or tokens (samples, length) of an
            integer dtype in place of a sample of it. Recipes that order channels or use GPTQ need
            it.
        device: where blocks are computed; None: the GPU if there is one, else the CPU.
        dtype: of the computation: float32, bfloat16 or float16, as torch's dtype or by name; None:
            float32 on a CPU, otherwise the source's own.
        backend: implementation of the operations; None picks by device.
        resume: go on with an interrupted run of the same source, recipe and text.
        on_start: called with the blocks that are done and all blocks, once everything is checked.
        on_block: called after each finished block, for progress. What a callback raises ends the
            run as an interrupt does: finished blocks stay in TARGET.partial, and the same call
            with `resume` goes on from there; before the first one nothing is left.

    Raises:
        ArgumentError: an argument is of another kind than it says here.
        CheckpointError: the source is damaged, the target exists or cannot be written.
        CalibrationError: the text is missing or too short.
        RecipeError: the recipe is unknown, does not quantize, or does not fit the model's sizes.
        ShapeError: no cache holds heads of that size, so that the checkpoint could not run.
        QuantizationError: a layer cannot be quantized.
    """
    ranks = Ranks.current()
    writer: CheckpointWriter | None = None
    with ranks.together():
        if ranks.leads:
            check_target(target, resume=resume)
        recipe = recipe if isinstance(recipe, Recipe) else _named(recipe)
        if not recipe.quantizes_weights:
            raise RecipeError(
                f"recipe {recipe.name!r} leaves the weights as they are: there is no checkpoint to "
                "make; load the source itself"
            )
        place, asked = usable_device(device), usable_dtype(dtype)
        backend = usable_backend(backend)
        opened = source if isinstance(source, TensorSource) else open_source(source)
        resolved = plan(opened.model_config, recipe)
        resolved.check_cache()
        check_tuning(resolved, ranks)
        check_targets(recipe)
        dtype = asked or default_dtype(opened, place)
        tokens = _calibration_tokens(opened, recipe, calibration)
        if ranks.leads:
            for note in opened.notes:
                _log.info("%s: %s", opened.folder, note)
            writer = CheckpointWriter(
                target,
                opened,
                resolved,
                calibration_hash=None if tokens is None else _hash(tokens),
                options={"device": place.type, "dtype": str(dtype), "backend": backend},
                resume=resume,
            )
    with writer or nullcontext():
        progress = BlockLog(ranks, writer)
        # Killed between the last rename and the clean-up, an earlier run has left nothing to do.
        if not progress.finished:
            if on_start is not None:
                on_start(progress.completed_blocks, opened.model_config.num_layers)
            _quantize_blocks(progress, opened, resolved, tokens, place, dtype, backend, on_block)
    return report_of(Path(target), resolved)


def report_of(target: Path, resolved: ModelPlan) -> QuantizeReport:
    """What was written to a target."""
    return QuantizeReport(
        target=target,
        recipe=resolved.recipe,
        bits_per_weight=bits_per_weight(resolved),
        checkpoint_bytes=sum(f.stat().st_size for f in target.glob("*.safetensors")),
    )


def _quantize_blocks(
    log: BlockLog,
    source: TensorSource,
    resolved: ModelPlan,
    tokens: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend | None,
    on_block: Callable[[QuantizedBlock], None] | None,
) -> None:
    share = None if tokens is None else Share(log.ranks, *tokens.shape)
    log.resume(share, device)
    streams = log.streams
    if streams is None and tokens is not None:
        assert share is not None
        with log.ranks.together():
            hidden = embed(source, tokens[share.own], device, dtype)
        streams = Streams(hidden, hidden)
    quantizer = BlockQuantizer(
        source,
        resolved,
        device=device,
        dtype=dtype,
        streams=streams,
        backend=backend,
        share=share or Share(log.ranks, 0, 1),
    )
    for block in quantizer.run(log.first):
        log.add(block, streams, share)
        if on_block is not None:
            on_block(block)
        del block  # or it would stay until the next one is made
    report = {
        "recipe": resolved.recipe.name,
        "source": list(source.notes),
        "blocks": log.describe(resolved.recipe.calibration.min_expert_tokens),
    }
    log.finish({REPORT_FILE: report})


def _named(name: str) -> Recipe:
    if not isinstance(name, str):
        raise RecipeError(f"recipe must be a Recipe or the name of a preset, got {shown(name)}")
    if name not in PRESETS:
        raise RecipeError(unknown("recipe", name, PRESETS))
    return PRESETS[name]


def _calibration_tokens(
    source: TensorSource, recipe: Recipe, text: str | Path | Tensor | None
) -> Tensor | None:
    """(samples, length) int64, or None for a recipe that measures nothing."""
    if isinstance(text, Tensor):
        check_tokens(text)
    if not recipe.needs_calibration:
        find_tokenizer(source)  # read before the work: it is written after it
        return None
    if text is None:
        raise CalibrationError(
            f"recipe {recipe.name!r} measures statistics on text: give a .txt or .jsonl file with "
            "--calibration"
        )
    return read_tokens(source, recipe.calibration, text)


def read_tokens(source: TensorSource, spec: CalibrationSpec, text: str | Path | Tensor) -> Tensor:
    """Sequences of a text for a model, (samples, length) int64; tokens are taken as they are.

    Raises:
        CalibrationError: the text is missing or too short, its sequences are longer than the
            model's positions, or tokens are none of the model's.
    """
    if isinstance(text, Tensor):
        check_tokens(text)
        text = text.to(device="cpu", dtype=torch.int64)
    length, limit = spec.sequence_length, source.model_config.max_position
    length = text.shape[1] if isinstance(text, Tensor) else length
    if length > limit:
        raise CalibrationError(
            f"calibration sequences of {length} tokens are longer than the model's {limit} "
            "positions: give a smaller --sequence-length"
        )
    vocab_size = source.model_config.vocab_size
    if isinstance(text, Tensor):
        check_token_ids(text, vocab_size, "the calibration")
        return text
    return calibration_tokens(text, tokenizer_from_source(source), spec, vocab_size)


def _hash(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
