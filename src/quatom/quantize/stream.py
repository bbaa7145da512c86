"""Quantize a model block by block: each block is calibrated on the output of the last ones.

Two streams of hidden states walk through the blocks. The float stream is the original network: its
inputs choose the channel orders. The quantized stream is the network made so far: the second
moments that GPTQ compensates are those of *its* quantized inputs, so that a block also makes up
for errors of the blocks before it. Only one block is in memory at a time.

Source: Atom (Zhao et al., MLSys 2024): orders from float statistics, GPTQ on quantized inputs.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.errors import QuantizationError
from quatom.loading import (
    FUSED,
    FloatBlock,
    build_float_block,
    load_float_block,
    place_layouts,
    quantized_place,
)
from quatom.modeling.llama import BlockInputs, DecoderBlock
from quatom.modeling.rope import rotary_table
from quatom.ops.backend import Backend
from quatom.quantize.block import (
    RoundedPlace,
    arrange_block,
    balance_keys,
    choose_orders,
    gate_up_rows,
    rotate_values,
    round_place,
    stored_tensors,
)
from quatom.quantize.host_memory import return_free_memory
from quatom.quantize.statistics import (
    ChannelScores,
    KeyStatistics,
    SecondMoments,
    TargetMoments,
    batch_slices,
    observe,
    run_batch,
    run_block,
)
from quatom.recipe import PRESETS, Recipe


@dataclass(slots=True)
class Streams:
    """Hidden states that enter the next block, each (sequences, length, hidden)."""

    float_hidden: Tensor | None
    """None where channel scores are known: the float stream is not run then."""
    quantized_hidden: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """What quantizing one block gave."""

    index: int
    num_blocks: int
    tensors: dict[str, Tensor]
    """Stored tensors by full name, on the CPU."""
    module: DecoderBlock
    """The block as the checkpoint will run it."""
    linear_errors: dict[str, float]
    """Relative output error that rounding caused at each place, on the calibration inputs."""
    relative_error: float | None
    """||quantized - float|| / ||float|| of the hidden states behind it; None uncalibrated."""
    seconds: float


def embed(source: TensorSource, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Hidden states that enter the first block, (sequences, length, hidden)."""
    config = source.model_config
    table = source.load("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    return torch.nn.functional.embedding(tokens, table).to(device=device, dtype=dtype)


class BlockQuantizer:
    """Quantizes the blocks of one model in order. `streams` is None for recipes without text."""

    def __init__(
        self,
        source: TensorSource,
        recipe: Recipe,
        *,
        device: torch.device,
        dtype: torch.dtype,
        streams: Streams | None,
        scores: Sequence[Mapping[str, Tensor]] | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Prepare to quantize `source`.

        Args:
            source: the floating-point model.
            recipe: how to quantize it.
            device: where blocks are computed.
            dtype: of the computation.
            streams: hidden states of the calibration text; None for recipes that read none.
            scores: channel scores of every block, of an earlier `collect_scores`.
            backend: implementation of the operations.
        """
        self.scores = scores
        self.source, self.recipe, self.config = source, recipe, source.model_config
        self.device, self.dtype, self.backend = device, dtype, backend
        self.streams = streams
        length = 1 if streams is None else streams.quantized_hidden.shape[1]
        self.rope = rotary_table(self.config, length, device)

    def run(self, first: int = 0) -> Iterator[QuantizedBlock]:
        """Quantize blocks `first` and later; streams hold the next block's input at each yield."""
        for index in range(first, self.config.num_layers):
            yield self.quantize(index)
            return_free_memory()

    def quantize(self, index: int) -> QuantizedBlock:
        """Quantize block `index` and advance the streams over it."""
        started = time.perf_counter()
        original = rotate_values(
            load_float_block(self.source, index, self.device, self.dtype),
            self.recipe,
            self.config,
        )
        entering = None
        if self.streams is not None and self.recipe.weights.target != "own_input":
            entering = self.streams.float_hidden  # kept beside the advanced stream
        scores = self._run_float(original) if self.scores is None else self.scores[index]
        key_offset = None
        if scores is not None:
            original, key_offset = balance_keys(original, scores, self.recipe, self.config)
        orders = {} if scores is None else choose_orders(scores, self.recipe, self.config)
        block = arrange_block(original, orders, self.recipe, self.config)
        moments, targets = self._moments(block, original, entering, orders, key_offset)
        del original
        # Each weight goes as its codes come: at no time is the block there several times over.
        rounded = {
            place: round_place(
                f"model.layers.{index} {place}",
                block.weights.pop(place),
                moments.pop(place, None),
                targets.pop(place, None),
                self.recipe,
                self.config,
                place,
            )
            for place in FUSED
        }
        module = self._build(block, rounded, orders, key_offset)
        return QuantizedBlock(
            index=index,
            num_blocks=self.config.num_layers,
            tensors=stored_tensors(
                index, block, rounded, orders, self.recipe, self.config, key_offset
            ),
            module=module,
            linear_errors={place: result.relative_error for place, result in rounded.items()},
            relative_error=self._run_quantized(index, module),
            seconds=time.perf_counter() - started,
        )

    def _run_float(self, block: FloatBlock) -> dict[str, Tensor] | None:
        """Advance the float stream; channel scores of its inputs, and statistics of its keys."""
        if self.streams is None or self.streams.float_hidden is None:
            return None
        scores = ChannelScores(self.recipe.outliers.metric)
        module = build_float_block(self.config, PRESETS["fp16"], block, backend=self.backend)
        keys = KeyStatistics(self.config, self.streams.float_hidden.shape[1])
        with observe(module, scores.add, keys.add):
            self.streams.float_hidden = run_block(module, self.streams.float_hidden, self.rope)
        return scores.sums | keys.finish(self.rope)

    def collect_scores(self) -> Iterator[dict[str, Tensor]]:
        """Statistics of block after block, nothing quantized: shared by several recipes."""
        for index in range(self.config.num_layers):
            block = load_float_block(self.source, index, self.device, self.dtype)
            scores = self._run_float(rotate_values(block, self.recipe, self.config))
            assert scores is not None
            yield scores

    def _moments(
        self,
        block: FloatBlock,
        original: FloatBlock,
        entering: Tensor | None,  # float stream in front of this block
        orders: dict[str, Tensor],
        key_offset: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """X^T X of the quantized inputs X of every place, and Y^T X of the outputs Y wanted."""
        weights = self.recipe.weights
        if self.streams is None or (
            weights.rounding == "nearest" and weights.clip_search != "output"
        ):
            return {}, {}
        run_time = {place: order for place, order in orders.items() if place != "down"}
        module = build_float_block(
            self.config, self.recipe, block, run_time, self.backend, key_offset
        )
        hidden = self.streams.quantized_hidden
        if weights.target != "own_input":
            assert entering is not None
            return self._target_moments(block, original, entering, hidden, module, orders)
        moments = SecondMoments(tf32=self.dtype != torch.float32)
        with observe(module, moments.add):
            run_block(module, hidden, self.rope)
        return moments.sums, {}

    def _target_moments(
        self,
        block: FloatBlock,
        original: FloatBlock,
        entering: Tensor,
        hidden: Tensor,  # quantized stream in front of this block
        module: DecoderBlock,  # float weights, quantized inputs
        orders: dict[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both moments, the outputs wanted being those of the floating-point network."""
        moments, targets = SecondMoments(tf32=self.dtype != torch.float32), TargetMoments()
        reference = build_float_block(self.config, PRESETS["fp16"], original, backend=self.backend)
        for batch in batch_slices(hidden):
            wanted: dict[str, Tensor] = {}
            inputs: dict[str, Tensor] = {}
            with observe(reference, lambda *_: None, wanted.__setitem__):
                run_batch(reference, entering[batch], self.rope)
            with observe(module, inputs.__setitem__):
                run_batch(module, hidden[batch], self.rope)
            if "down" in orders:  # whose order the rows of gate and up have
                wanted["gate_up"] = wanted["gate_up"][:, gate_up_rows(orders["down"])]
            for place, x in inputs.items():
                bias = block.biases[place]
                moments.add(place, x)
                targets.add(place, wanted[place] if bias is None else wanted[place] - bias, x)
        return moments.sums, targets.sums

    def _build(
        self,
        block: FloatBlock,
        rounded: dict[str, RoundedPlace],
        orders: dict[str, Tensor],
        key_offset: Tensor | None,
    ) -> DecoderBlock:
        layouts = place_layouts(self.recipe, self.config)
        linears, inputs = {}, {}
        for place, result in rounded.items():
            linears[place], inputs[place] = quantized_place(
                self.recipe,
                layouts[place],
                result.weight.values,
                result.weight.scales,
                block.biases[place],
                None if place == "down" else orders.get(place),
                self.backend,
            )
        return DecoderBlock(
            self.config,
            self.recipe.kv_cache,
            input_norm=block.input_norm,
            post_norm=block.post_norm,
            inputs=BlockInputs(**inputs),
            key_offset=key_offset,
            backend=self.backend,
            **linears,
        )

    def _run_quantized(self, index: int, module: DecoderBlock) -> float | None:
        """Advance the quantized stream; its distance from the float stream."""
        if self.streams is None:
            return None
        hidden = run_block(module, self.streams.quantized_hidden, self.rope)
        if not torch.isfinite(hidden).all():
            raise QuantizationError(
                f"block {index} gives values that are not finite after quantization in "
                f"{self.dtype}: check the source's weights, or quantize in --dtype float32"
            )
        self.streams.quantized_hidden = hidden
        target = self.streams.float_hidden
        if target is None:
            return None
        # In float32 a sequence at a time: whole streams would need another copy of each.
        error = sum(
            (q.float() - f.float()).square().sum() for q, f in zip(hidden, target, strict=True)
        )
        norm = sum(f.float().square().sum() for f in target)
        return float((error / norm).sqrt())
