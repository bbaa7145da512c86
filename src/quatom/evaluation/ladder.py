"""Measure the perplexity of a ladder's rungs, see `quatom.evaluation.ladders`.

A rung is quantized and evaluated block by block in one walk, so that only one block is in memory;
channel scores, which rungs share, are measured once and kept beside the result file.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.errors import CalibrationError
from quatom.evaluation.perplexity import mean_loss
from quatom.families.spec import Norm
from quatom.loading import build_float_block, load_float_block
from quatom.modeling.llama import DecoderBlock
from quatom.modeling.rope import rotary_table
from quatom.ops.backend import Backend
from quatom.ops.norm import norm
from quatom.quantize.block import balance_keys, rotate_values
from quatom.quantize.statistics import run_block
from quatom.quantize.stream import BlockQuantizer, Streams, embed
from quatom.recipe import PRESETS, Recipe


@dataclass(frozen=True, slots=True)
class Rung:
    """One measured rung."""

    name: str
    recipe: Recipe | None
    """None: the floating-point model."""
    perplexity: float


class LadderRun:
    """Measures the rungs of one model on one calibration and one evaluation text."""

    def __init__(
        self,
        source: TensorSource,
        calibration: Tensor,  # (samples, length) int64
        windows: Tensor,  # (windows, length) int64
        *,
        device: torch.device,
        dtype: torch.dtype,
        scores_file: Path,
        backend: Backend | None = None,
        on_block: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            source: the floating-point model.
            calibration: token windows that statistics are measured on.
            windows: token windows that perplexity is measured on.
            device: where blocks are computed.
            dtype: of the computation.
            scores_file: stem of the files that keep channel scores for a resumed run.
            backend: implementation of the operations.
            on_block: called with (blocks done, blocks in all) of the current rung.
        """
        self.source, self.config = source, source.model_config
        self.calibration, self.windows = calibration, windows
        self.device, self.dtype, self.backend = device, dtype, backend
        self.scores_file = scores_file
        self.on_block = on_block or (lambda done, total: None)
        self._scores: dict[str, list[dict[str, Tensor]]] = {}

    @torch.no_grad()
    def measure(self, name: str, recipe: Recipe | None) -> Rung:
        """Quantize with `recipe` and evaluate, block by block; None evaluates the float model."""
        recipe_or_float = PRESETS["fp16"] if recipe is None else recipe
        modules = (
            self._quantized_modules(recipe_or_float)
            if recipe_or_float.quantizes_weights
            else self._float_modules(recipe_or_float)
        )
        hidden = embed(self.source, self.windows, self.device, self.dtype)
        rope = rotary_table(self.config, self.windows.shape[1], self.device)
        for index, module in enumerate(modules):
            hidden = run_block(module, hidden, rope)
            self.on_block(index + 1, self.config.num_layers)
        return Rung(name, recipe, self._perplexity(hidden))

    def _float_modules(self, recipe: Recipe) -> Iterator[DecoderBlock]:
        """Blocks of floating-point linears with the recipe's KV cache."""
        scores = self._shared_scores(recipe) if recipe != PRESETS["fp16"] else None
        for index in range(self.config.num_layers):
            block = load_float_block(self.source, index, self.device, self.dtype)
            offset = None
            if scores is not None:
                block = rotate_values(block, recipe, self.config)
                block, offset = balance_keys(block, scores[index], recipe, self.config)
            yield build_float_block(
                self.config, recipe, block, backend=self.backend, key_offset=offset
            )

    def _quantized_modules(self, recipe: Recipe) -> Iterator[DecoderBlock]:
        needs_float = recipe.weights.target != "own_input"
        scores = None if needs_float else self._shared_scores(recipe)
        streams = None
        if recipe.weights.rounding == "gptq":
            hidden = embed(self.source, self.calibration, self.device, self.dtype)
            streams = Streams(hidden if needs_float else None, hidden)
        for block in self._quantizer(recipe, streams, scores).run():
            yield block.module

    def _quantizer(
        self,
        recipe: Recipe,
        streams: Streams | None,
        scores: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> BlockQuantizer:
        return BlockQuantizer(
            self.source,
            recipe,
            device=self.device,
            dtype=self.dtype,
            streams=streams,
            scores=scores,
            backend=self.backend,
        )

    def _shared_scores(self, recipe: Recipe) -> list[dict[str, Tensor]]:
        """Channel scores of all blocks; what changes them is the rotation of values alone."""
        key = f"{recipe.outliers.metric}-{recipe.kv_cache.value_rotation}-keys"
        if key in self._scores:
            return self._scores[key]
        file = self.scores_file.with_name(f"{self.scores_file.name}.{key}.safetensors")
        if file.exists():
            flat = load_file(file, device=str(self.device))
        else:
            hidden = embed(self.source, self.calibration, self.device, self.dtype)
            quantizer = self._quantizer(recipe, Streams(hidden, hidden))
            flat = {
                f"{index}.{place}": score
                for index, scores in enumerate(quantizer.collect_scores())
                for place, score in scores.items()
            }
            # Renamed into place: another process may be looking for it.
            temporary = file.with_name(f"{file.name}.{os.getpid()}")
            save_file({name: score.cpu() for name, score in flat.items()}, temporary)
            temporary.replace(file)
        self._scores[key] = [
            {
                name.removeprefix(f"{index}."): tensor
                for name, tensor in flat.items()
                if name.startswith(f"{index}.")
            }
            for index in range(self.config.num_layers)
        ]
        return self._scores[key]

    def _perplexity(self, hidden: Tensor) -> float:
        config, source = self.config, self.source

        def outer(name: str) -> Tensor:
            return source.load(name).to(device=self.device, dtype=self.dtype)

        weight = outer("model.norm.weight")
        tied = config.tie_word_embeddings
        head = outer("model.embed_tokens.weight" if tied else "lm_head.weight")
        losses = [
            mean_loss(
                norm(states, weight, norm=Norm(eps=config.rms_norm_eps))[0],
                window.to(self.device),
                lambda rows: torch.nn.functional.linear(rows, head).float(),
            )
            for states, window in zip(hidden, self.windows, strict=True)
        ]
        if not all(map(math.isfinite, losses)):
            raise CalibrationError("the loss is not finite: evaluate in --dtype float32")
        return math.exp(math.fsum(losses) / len(losses))
