"""Measure the perplexity of a ladder's rungs, see `quatom.evaluation.ladders`.

A rung is quantized and evaluated block by block in one walk, so that only one block is in memory;
channel scores, which rungs share, are measured once and kept beside the result file.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.evaluation.output_head import OutputHead
from quatom.evaluation.perplexity import mean_loss, perplexity_of
from quatom.loading import load_float_layer
from quatom.modeling.block import DecoderBlock
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.ops.backend import Backend
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.finite import check_finite_block
from quatom.quantize.measure import wanted_statistics
from quatom.quantize.statistics import run_block
from quatom.quantize.transforms import Statistics, transforms_of
from quatom.quantize.walk import BlockQuantizer, Streams, embed
from quatom.recipe import Recipe


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
        self._statistics: dict[str, list[dict[str, Tensor]]] = {}

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
        rotary = RotaryTables(self.config, self.windows.shape[1], self.device)
        for index, module in enumerate(modules):
            hidden = run_block(module, hidden, rotary)
            check_finite_block(hidden, index, f"rung {name}", self.dtype)
            self.on_block(index + 1, self.config.num_layers)
        return Rung(name, recipe, self._perplexity(hidden))

    def _float_modules(self, recipe: Recipe) -> Iterator[DecoderBlock]:
        """Blocks of floating-point linears with the recipe's KV cache."""
        transforms = transforms_of(recipe)
        statistics = self._shared_statistics(recipe) if transforms.after else None
        for layer in plan(self.config, recipe).layers:
            weights = load_float_layer(self.source, layer, self.device, self.dtype)
            measured = None if statistics is None else statistics[layer.index]
            weights = transforms.finish(layer, transforms.prepare(layer, weights), measured)
            yield build_block(layer, weights, self.backend)

    def _quantized_modules(self, recipe: Recipe) -> Iterator[DecoderBlock]:
        needs_float = recipe.float_target > 0 or recipe.tuning is not None
        statistics = None if needs_float else self._shared_statistics(recipe)
        streams = None
        if recipe.needs_moments or recipe.tuning is not None:
            hidden = embed(self.source, self.calibration, self.device, self.dtype)
            streams = Streams(hidden if needs_float else None, hidden)
        for block in self._quantizer(recipe, streams, statistics).run():
            yield block.module

    def _quantizer(
        self,
        recipe: Recipe,
        streams: Streams | None,
        statistics: Sequence[Statistics] | None = None,
    ) -> BlockQuantizer:
        return BlockQuantizer(
            self.source,
            plan(self.config, recipe),
            device=self.device,
            dtype=self.dtype,
            streams=streams,
            statistics=statistics,
            backend=self.backend,
        )

    def _shared_statistics(self, recipe: Recipe) -> list[dict[str, Tensor]]:
        """Statistics of all blocks, shared by recipes that measure the same."""
        key = "-".join(wanted_statistics(recipe))
        if key in self._statistics:
            return self._statistics[key]
        file = self.scores_file.with_name(f"{self.scores_file.name}.{key}.safetensors")
        if file.exists():
            flat = load_file(file, device=str(self.device))
        else:
            hidden = embed(self.source, self.calibration, self.device, self.dtype)
            quantizer = self._quantizer(recipe, Streams(hidden, hidden))
            flat = {
                f"{index}.{name}": value
                for index, measured in enumerate(quantizer.collect_statistics())
                for name, value in measured.items()
            }
            # Renamed into place: another process may be looking for it.
            temporary = file.with_name(f"{file.name}.{os.getpid()}")
            save_file({name: value.cpu() for name, value in flat.items()}, temporary)
            temporary.replace(file)
        self._statistics[key] = [
            {
                name.removeprefix(f"{index}."): tensor
                for name, tensor in flat.items()
                if name.startswith(f"{index}.")
            }
            for index in range(self.config.num_layers)
        ]
        return self._statistics[key]

    def _perplexity(self, hidden: Tensor) -> float:
        head = OutputHead(self.source, self.device, self.dtype, self.backend)
        losses = [
            mean_loss(head.norm(states), window.to(self.device), head.logits)
            for states, window in zip(hidden, self.windows, strict=True)
        ]
        return perplexity_of(losses)
