"""Quantize a model block by block: each block is calibrated on the output of the last ones.

Two streams of hidden states walk through the blocks. The float stream is the original network: its
inputs choose the channel orders. The quantized stream is the network made so far: the second
moments that GPTQ compensates are those of *its* quantized inputs, so that a block also makes up
for errors of the blocks before it. Only one block is in memory at a time.

Several processes share the sequences (`quatom.quantize.lanes`) and the sites that are rounded. Each
has its own part of both streams, and the same block.

Source: Atom (Zhao et al., MLSys 2024): orders from float statistics, GPTQ on quantized inputs.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quatom.checkpoint.codec import encode_layer
from quatom.checkpoint.reader import TensorSource
from quatom.loading import load_float_layer
from quatom.modeling.block import DecoderBlock
from quatom.modeling.build import build_block
from quatom.modeling.decoder import finish_embedding
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer, LayerWeights
from quatom.ops.backend import Backend
from quatom.plan import LayerPlan, ModelPlan, plan
from quatom.presets import PRESETS
from quatom.quantize.alike import check_alike
from quatom.quantize.expert_report import ExpertReport
from quatom.quantize.finite import check_finite_block
from quatom.quantize.host_memory import return_free_memory
from quatom.quantize.lanes import Share
from quatom.quantize.measure import EXPERT_TOKENS, Moments, measure_channels, measure_moments
from quatom.quantize.rounding import round_layer
from quatom.quantize.statistics import (
    run_block,
)
from quatom.quantize.targets import check_targets, measure_targets
from quatom.quantize.transforms import Statistics, transforms_of
from quatom.quantize.tuning.descent import Outcome, Text
from quatom.quantize.tuning.tune import check_tuning, tune


@dataclass(slots=True)
class Streams:
    """Hidden states that enter the next block, each (sequences, length, hidden): this process's."""

    float_hidden: Tensor | None
    """None where statistics are known: the float stream is not run then."""
    quantized_hidden: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """What quantizing one block gave."""

    index: int
    num_blocks: int
    tensors: dict[str, Tensor]
    """Stored tensors by full name, on the CPU; none in processes that do not write."""
    module: DecoderBlock
    """The block as the checkpoint will run it."""
    linear_errors: dict[str, float]
    """Relative output error that rounding caused at each site, on the calibration inputs; of routed
    experts the root mean square of all."""
    relative_error: float | None
    """||quantized - float|| / ||float|| of the hidden states after it; None uncalibrated."""
    seconds: float
    experts: ExpertReport | None = None
    """What was done with each expert, where there are any."""
    tuning: Outcome | None = None
    """What tuning brought, where the recipe tunes."""


def embed(source: TensorSource, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Hidden states that enter the first block, (sequences, length, hidden)."""
    config = source.model_config
    table = source.load(config.embedding_name, (config.vocab_size, config.hidden_size))
    rows = torch.nn.functional.embedding(tokens, table).to(device=device, dtype=dtype)
    learned = None
    if config.positions is not None:
        learned = source.load(config.positions.name).to(device=device, dtype=dtype)
    positions = torch.arange(tokens.shape[1], device=device)
    return finish_embedding(config, rows, learned, positions)


class BlockQuantizer:
    """Quantizes the blocks of one model in order. `streams` is None for recipes without text."""

    def __init__(
        self,
        source: TensorSource,
        resolved: ModelPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        streams: Streams | None,
        statistics: Sequence[Statistics] | None = None,
        backend: Backend | None = None,
        share: Share | None = None,
    ) -> None:
        """Prepare to quantize `source`.

        Args:
            source: the floating-point model.
            resolved: how to quantize it.
            device: where blocks are computed.
            dtype: of the computation.
            streams: hidden states of the calibration text; None for recipes that read none.
            statistics: of every block, from an earlier `collect_statistics`.
            backend: implementation of the operations.
            share: which of all sequences `streams` hold; None: this process is alone.

        Raises:
            RecipeError: the recipe tunes, and the model cannot be tuned so, or it compares outputs
                of the floating-point model with rows that it scales.
        """
        self.statistics = statistics
        if share is None:
            alone = torch.empty(0, 1) if streams is None else streams.quantized_hidden
            share = Share.of_one(alone)
        self.share, self.ranks = share, share.ranks
        check_tuning(resolved, self.ranks)
        check_targets(resolved.recipe)
        self.source, self.plan, self.recipe = source, resolved, resolved.recipe
        self.float_plan = plan(resolved.config, PRESETS["fp16"])
        self.transforms = transforms_of(resolved.recipe)
        self.device, self.dtype, self.backend = device, dtype, backend
        self.streams = streams
        length = 1 if streams is None else streams.quantized_hidden.shape[1]
        self.rotary = RotaryTables(resolved.config, length, device)

    def run(self, first: int = 0) -> Iterator[QuantizedBlock]:
        """Quantize blocks `first` and later; streams hold the next block's input at each yield."""
        for index in range(first, self.plan.config.num_layers):
            yield self.quantize(index)
            return_free_memory()

    def quantize(self, index: int) -> QuantizedBlock:
        """Quantize block `index` and advance the streams over it."""
        started = time.perf_counter()
        layer = self.plan.layers[index]
        original = self._prepared(layer)
        entering = None
        if self.streams is not None and self.recipe.float_target > 0:
            entering = self.streams.float_hidden  # kept beside the advanced stream
        statistics = (
            self._run_float(index, original) if self.statistics is None else self.statistics[index]
        )
        with self.ranks.together():
            arranged = self.transforms.finish(layer, original, statistics)
        check_alike(self.ranks, layer, arranged)
        moments, targets, tokens = self._moments(layer, arranged, original, entering)
        floats = dict(arranged.sites)
        rest = replace(arranged, sites={})
        if self.recipe.tuning is None:
            arranged = rest  # the weight of each site leaves the memory as its codes come
        del original
        codes, errors, nearest = round_layer(
            layer, floats, moments, targets, self.recipe, self.share, self.device
        )
        weights = LayerWeights(
            norms=rest.norms,
            sites=codes,
            qk_norm=rest.qk_norm,
            key_offset=rest.key_offset,
            sinks=rest.sinks,
            router=rest.router,
        )
        weights, outcome = self._tuned(layer, arranged, weights)
        del arranged
        with self.ranks.together():
            tensors = encode_layer(layer, weights) if self.ranks.leads else {}
            module = build_block(layer, weights, self.backend)
        return QuantizedBlock(
            index=index,
            num_blocks=self.plan.config.num_layers,
            tensors=tensors,
            module=module,
            linear_errors=errors,
            relative_error=self._run_quantized(index, module),
            seconds=time.perf_counter() - started,
            experts=None
            if nearest is None
            else ExpertReport((statistics or {}).get(EXPERT_TOKENS), tokens, nearest),
            tuning=outcome,
        )

    def collect_statistics(self) -> Iterator[dict[str, Tensor]]:
        """Statistics of block after block, nothing quantized: shared by several recipes."""
        for index, layer in enumerate(self.plan.layers):
            statistics = self._run_float(index, self._prepared(layer))
            assert statistics is not None
            yield statistics

    def _prepared(self, layer: LayerPlan) -> FloatLayer:
        with self.ranks.together():
            weights = load_float_layer(self.source, layer, self.device, self.dtype)
            return self.transforms.prepare(layer, weights)

    def _run_float(self, index: int, weights: FloatLayer) -> dict[str, Tensor] | None:
        """Advance the float stream, and measure it."""
        if self.streams is None or self.streams.float_hidden is None:
            return None
        with self.ranks.together():
            module = build_block(self.float_plan.layers[index], weights, self.backend)
        self.streams.float_hidden, statistics = measure_channels(
            module, self.streams.float_hidden, self.rotary, self.recipe, self.share
        )
        with self.ranks.together():
            check_finite_block(self.streams.float_hidden, index, "in floating point", self.dtype)
        return statistics

    def _moments(
        self,
        layer: LayerPlan,
        arranged: FloatLayer,
        original: FloatLayer,
        entering: Tensor | None,  # float stream in front of this block
    ) -> tuple[Moments, Moments, Tensor | None]:
        """X^T X of the quantized inputs X of every site, and Y^T X of target outputs Y.

        Then the tokens of each expert, (E,), where they were counted.
        """
        tf32 = self.dtype != torch.float32
        if self.streams is None or not self.recipe.needs_moments:
            return {}, {}, None
        with self.ranks.together():
            module = build_block(layer, arranged, self.backend)
        if self.recipe.float_target > 0:
            assert entering is not None
            with self.ranks.together():
                reference = build_block(self.float_plan.layers[layer.index], original, self.backend)
            streams = entering, self.streams.quantized_hidden
            own, targets = measure_targets(
                module, reference, arranged, streams, self.rotary, tf32=tf32, share=self.share
            )
            return own, targets, None
        moments, tokens = measure_moments(
            module,
            self.streams.quantized_hidden,
            self.rotary,
            tf32=tf32,
            bound=self.recipe.calibration.min_expert_tokens,
            share=self.share,
        )
        return moments, {}, tokens

    def _tuned(
        self, layer: LayerPlan, floats: FloatLayer, rounded: LayerWeights
    ) -> tuple[LayerWeights, Outcome | None]:
        """The rounded layer after tuning, and what that brought."""
        tuning, streams = self.recipe.tuning, self.streams
        if tuning is None:
            return rounded, None
        assert streams is not None
        assert streams.float_hidden is not None
        text = Text(streams.quantized_hidden, streams.float_hidden, self.rotary)
        return tune(layer, floats, rounded, text, tuning, self.recipe.calibration.seed)

    def _run_quantized(self, index: int, module: DecoderBlock) -> float | None:
        """Advance the quantized stream; its distance from the float stream."""
        if self.streams is None:
            return None
        with self.ranks.together():
            hidden = run_block(module, self.streams.quantized_hidden, self.rotary)
            check_finite_block(hidden, index, "after quantization", self.dtype)
        self.streams.quantized_hidden = hidden
        target = self.streams.float_hidden
        if target is None:
            return None
        # In float32 a sequence at a time: whole streams would need another copy of each.
        own = [
            torch.stack(((q.float() - f.float()).square().sum(), f.float().square().sum()))
            for q, f in zip(hidden, target, strict=True)
        ]
        squares = self.share.collect(torch.stack(own) if own else hidden.new_zeros(0, 2).float())
        if squares is None:
            return None
        error, norm = (sum(column) for column in squares.cpu().unbind(1))
        return float((error / norm) ** 0.5)
