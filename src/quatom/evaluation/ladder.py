"""Ladders of recipes: each rung adds one part to the one before, and its perplexity is measured.

"atom" is the ablation of the paper and its poster; "quatom" goes on from the whole Atom recipe;
"keys" leaves all but the KV cache in floating point and shows what INT4 keys alone cost;
"activations" compares formats and scales of W4A8.
A rung is quantized and evaluated block by block in one walk, so that only one block is in memory;
channel scores, which rungs share, are measured once and kept beside the result file.

Source: Atom (Zhao et al., MLSys 2024), accuracy ablation.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quatom.checkpoint.reader import TensorSource
from quatom.errors import CalibrationError
from quatom.evaluation.perplexity import mean_loss
from quatom.loading import build_float_block, load_float_block
from quatom.modeling.llama import DecoderBlock
from quatom.modeling.rope import rotary_table
from quatom.ops.backend import Backend
from quatom.ops.rmsnorm import rmsnorm
from quatom.quantize.block import balance_keys, rotate_values
from quatom.quantize.statistics import run_block
from quatom.quantize.stream import BlockQuantizer, Streams, embed
from quatom.recipe import (
    PRESETS,
    ActivationFormat,
    ActivationSpec,
    KVSpec,
    OutlierSpec,
    Recipe,
    WeightSpec,
)


def _atom_ladder() -> dict[str, Recipe]:
    rtn = replace(PRESETS["rtn-w4a4"], name="rtn")
    fp16 = replace(rtn, outliers=OutlierSpec(format="float16"))
    int8 = replace(rtn, outliers=OutlierSpec())
    groups = replace(
        int8,
        weights=WeightSpec(rounding="nearest", rows_per_scale=2),
        activations=ActivationSpec(),
    )
    clipping = replace(
        groups,
        weights=replace(groups.weights, clip_ratio=0.85),
        activations=ActivationSpec(clip_ratio=0.9),
    )
    gptq = replace(clipping, weights=replace(clipping.weights, rounding="gptq"))
    return {
        "rtn": rtn,
        "outliers_fp16": fp16,
        "outliers_int8": int8,
        "groups": groups,
        "clipping": clipping,
        "gptq": gptq,
        "kv4": replace(gptq, kv_cache=KVSpec()),
    }


def _quatom_ladder() -> dict[str, Recipe]:
    atom = PRESETS["atom-w4a4kv4"]
    rotation = replace(atom, activations=ActivationSpec(rotation="hadamard"))
    keys = replace(rotation, kv_cache=KVSpec(keys="post_rope", rotation="hadamard"))
    values = replace(keys, kv_cache=replace(keys.kv_cache, value_rotation="hadamard"))
    weights = replace(values, weights=replace(atom.weights, clip_ratio=1.0, clip_search="mse"))
    clipping = replace(weights, activations=replace(weights.activations, clip_ratio=0.95))
    offset = replace(clipping, kv_cache=replace(clipping.kv_cache, key_offset="mean"))
    scaling = replace(offset, kv_cache=replace(offset.kv_cache, key_scaling="balanced"))
    searched = replace(scaling, weights=replace(scaling.weights, clip_search="output"))
    return {
        "atom": atom,
        "group_rotation": rotation,
        "rotated_keys": keys,
        "rotated_values": values,
        "searched_weights": weights,
        "activation_clipping": clipping,
        "key_offset": offset,
        "key_scaling": scaling,
        "key_scaling_output_search": searched,
        "key_scaling_output_search_columns": replace(
            searched, weights=replace(searched.weights, column_order="important_first")
        ),
        "output_weighted_search": replace(
            clipping, weights=replace(clipping.weights, clip_search="output")
        ),
        "important_columns_first": replace(
            clipping, weights=replace(clipping.weights, column_order="important_first")
        ),
        "float_input_target": replace(
            clipping, weights=replace(clipping.weights, target="float_input")
        ),
        "half_float_input_target": replace(
            clipping,
            weights=replace(clipping.weights, target="float_input", target_strength=0.5),
        ),
    }


def _keys_ladder() -> dict[str, Recipe]:
    original = replace(PRESETS["fp16"], kv_cache=KVSpec())
    rotated = replace(original, kv_cache=KVSpec(keys="post_rope", rotation="hadamard"))
    offset = replace(rotated, kv_cache=replace(rotated.kv_cache, key_offset="mean"))
    scaling = replace(offset, kv_cache=replace(offset.kv_cache, key_scaling="balanced"))
    return {
        "kv4_alone": original,
        "kv4_rotated": rotated,
        "kv4_offset": offset,
        "kv4_scaling": scaling,
    }


def _activations_ladder() -> dict[str, Recipe]:
    def rung(form: ActivationFormat, group_size: int, *, rotated: bool = True) -> Recipe:
        activations = ActivationSpec(
            format=form, group_size=group_size, rotation="hadamard" if rotated else "none"
        )
        return replace(preset, weights=weights, activations=activations)

    preset, w4a4 = PRESETS["quatom-w4a8kv4"], PRESETS["quatom-w4a4kv4"]
    free = replace(w4a4.activations, scale_format="float16")
    weights = replace(preset.weights, scale_format="float16")
    return {
        "e4m3_scale_a_group": rung("e4m3", 128),
        "e4m3_scale_a_token": rung("e4m3", -1),
        "int8_scale_a_group": rung("int8", 128),
        "int8_scale_a_token": rung("int8", -1),
        "int8_scale_a_token_multiples": preset,
        "int4_free_scales": replace(w4a4, weights=weights, activations=free),
        "int4_multiples_of_weights": replace(w4a4, activations=free),
        "int4_multiples": w4a4,
        "unrotated_e4m3_scale_a_group": rung("e4m3", 128, rotated=False),
        "unrotated_e4m3_scale_a_token": rung("e4m3", -1, rotated=False),
    }


LADDERS: Mapping[str, Mapping[str, Recipe]] = {
    "atom": _atom_ladder(),
    "quatom": _quatom_ladder(),
    "keys": _keys_ladder(),
    "activations": _activations_ladder(),
}
"""Rungs by name, in order. "key_scaling" is the quatom recipe; what follows it are tries, first on
top of it, then each beside "activation_clipping". Rungs of "activations" are beside each other."""


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

        norm = outer("model.norm.weight")
        tied = config.tie_word_embeddings
        head = outer("model.embed_tokens.weight" if tied else "lm_head.weight")
        losses = [
            mean_loss(
                rmsnorm(states, norm, eps=config.rms_norm_eps)[0],
                window.to(self.device),
                lambda rows: torch.nn.functional.linear(rows, head).float(),
            )
            for states, window in zip(hidden, self.windows, strict=True)
        ]
        if not all(map(math.isfinite, losses)):
            raise CalibrationError("the loss is not finite: evaluate in --dtype float32")
        return math.exp(math.fsum(losses) / len(losses))
