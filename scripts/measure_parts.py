"""Where a recipe's loss comes from: one network, with some of its operands left unrounded.

One walk over the blocks quantizes the model, and one stream of evaluation text per variant runs
through each block as it comes. Whole sequences attend at once, inputs and cache are rounded as
`quatom.quantize.tuning.block` rounds them. The table is in docs/lab/accuracy.md:

    python scripts/measure_parts.py MODEL NAME RECIPE CALIBRATION TEXT WINDOWS LENGTH \
        SAMPLES CALIBRATION_LENGTH DEVICE parts-NAME-MACHINE.json
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from quatom.benchmark.environment import command_line, describe_environment, write_results
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.evaluation.corpora import load_corpus
from quatom.evaluation.output_head import OutputHead
from quatom.evaluation.perplexity import cut_windows, mean_loss
from quatom.evaluation.standard_error import of_mean
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.numerics.hadamard import rotate_groups
from quatom.ops.activations import QuantizeSpec
from quatom.placement import default_dtype, usable_device
from quatom.plan import LayerPlan, plan
from quatom.presets import PRESETS
from quatom.quantize.calibration_data import calibration_tokens
from quatom.quantize.statistics import run_block
from quatom.quantize.tuning import block as tuned
from quatom.quantize.tuning.codes import LearnedCodes
from quatom.quantize.tuning.straight_through import quantize_head, quantize_input
from quatom.quantize.walk import BlockQuantizer, Streams, embed
from quatom.recipe import CalibrationSpec
from quatom.recipe_tuning import TuningSpec


class Variant(NamedTuple):
    """What is rounded. Bits of 0 are floating point."""

    weights: bool = True
    inputs: bool = True
    first_bits: int = 4
    """Of the cache of the first tokens."""
    first: int = 0
    """How many those are."""
    bits: int = 4
    """Of the cache of the others."""


VARIANTS = {
    "float": Variant(weights=False, inputs=False, bits=0),
    "all": Variant(),
    "first token in float": Variant(first_bits=0, first=1),
    "first token in 8 bits": Variant(first_bits=8, first=1),
    "first four tokens in float": Variant(first_bits=0, first=4),
    "cache in 8 bits": Variant(bits=8),
    "cache in float": Variant(bits=0),
    "inputs in float": Variant(inputs=False),
    "weights in float": Variant(weights=False),
    "weights alone": Variant(inputs=False, bits=0),
    "inputs alone": Variant(weights=False, bits=0),
    "cache alone": Variant(weights=False, inputs=False),
    "cache alone, first token in float": Variant(
        weights=False, inputs=False, first_bits=0, first=1
    ),
}


class Rounding:
    """Stands in for the rounding of `quatom.quantize.tuning.block`."""

    def __init__(self, length: int) -> None:
        self.variant, self.length = VARIANTS["all"], length

    def head(self, x: Tensor, bits: int, clip_ratio: float) -> Tensor:  # (T, KV, D)
        """Keys or values as the cache gives them back; `bits` of the recipe are not used."""
        variant = self.variant
        made = quantize_head(x, variant.bits, clip_ratio) if variant.bits else x
        if variant.first:
            own = quantize_head(x, variant.first_bits, clip_ratio) if variant.first_bits else x
            position = torch.arange(len(x), device=x.device) % self.length
            made = torch.where((position < variant.first).view(-1, 1, 1), own, made)
        return made

    def inputs(
        self, x: Tensor, order: Tensor | None, spec: QuantizeSpec | None, *, repeats: bool = False
    ) -> Tensor:
        """The input of a linear, ordered and rotated in every variant."""
        if self.variant.inputs or spec is None:
            return quantize_input(x, order, spec, repeats=repeats)
        x = x if order is None else x.index_select(-1, order)
        return rotate_groups(x, spec.layout).to(x.dtype) if spec.rotate else x


class Simulated(tuned.TunedBlock):
    """A block that runs with other weights than its own."""

    def __init__(self, block: tuned.TunedBlock, weights: Mapping[str, Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.spec, self.plan = block.spec, block.plan
        self._run, self._weights = [block], weights  # in a list: its parameters are not this one's

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As that of the block."""
        made: tuple[Tensor, Tensor] = functional_call(self._run[0], dict(self._weights), arguments)
        return made


class Catching(BlockQuantizer):
    """Keeps the last layer before and after it was rounded, and tunes nothing."""

    def _tuned(
        self, layer: LayerPlan, floats: FloatLayer, rounded: LayerWeights
    ) -> tuple[LayerWeights, None]:
        self.caught = layer, floats, rounded
        return rounded, None


@torch.no_grad()
def main() -> None:
    """Measure all variants and write the result file."""
    source, name, recipe_name, calibration, text, *numbers, device, out = sys.argv[1:]
    count, length, samples, calibration_length = map(int, numbers)
    opened, place = open_source(source), usable_device(device)
    dtype, tokenizer = default_dtype(opened, place), tokenizer_from_source(opened)
    spec = CalibrationSpec(num_samples=samples, sequence_length=calibration_length)
    config = opened.model_config
    tokens = calibration_tokens(Path(calibration), tokenizer, spec, config.vocab_size)
    corpus = load_corpus(text, tokenizer, sequence_length=length)
    windows = cut_windows(corpus.tokens, length, count)
    rounding = Rounding(length)
    for function, stands_in in (
        ("quantize_head", rounding.head),
        ("quantize_input", rounding.inputs),
    ):
        setattr(tuned, function, stands_in)
    # Only so that layers are kept whole beside their codes: nothing is tuned.
    recipe = replace(PRESETS[recipe_name], tuning=TuningSpec())
    hidden = embed(opened, tokens, place, dtype)
    walk = Catching(
        opened, plan(config, recipe), device=place, dtype=dtype, streams=Streams(hidden, hidden)
    )
    rotary = RotaryTables(config, length, place)
    states = {variant: embed(opened, windows, place, dtype) for variant in VARIANTS}
    for block in walk.run():
        layer, floats, rounded = walk.caught
        made = tuned.build_tuned_block(layer, floats)
        codes = {n: held for n, held in rounded.sites.items() if isinstance(held, SiteCodes)}
        weights = LearnedCodes(layer, floats, codes, TuningSpec()).tensors()
        for variant, rounding.variant in VARIANTS.items():
            own = weights if rounding.variant.weights else {}
            states[variant] = run_block(Simulated(made, own), states[variant], rotary)
        print(f"block {block.index + 1} of {block.num_blocks}", flush=True)
    head = OutputHead(opened, place, dtype, None)
    losses = {
        variant: [
            mean_loss(head.norm(h), window.to(place), head.logits)
            for h, window in zip(hidden, windows, strict=True)
        ]
        for variant, hidden in states.items()
    }
    entries = []
    for variant, found in losses.items():
        increases = [a - b for a, b in zip(found, losses["float"], strict=True)]
        entry = {
            "model": name,
            "recipe": recipe_name,
            "corpus": corpus.name,
            "windows": len(windows),
            "sequence_length": length,
            "rung": variant,
            "perplexity": math.exp(math.fsum(found) / len(found)),
            "loss_increase": math.fsum(increases) / len(increases),
            "loss_increase_standard_error": of_mean(increases),
            "calibration": f"{samples} x {calibration_length}, seed 0",
        }
        entries.append(entry)
        print(f"{variant:36} {entry['perplexity']:9.3f} {entry['loss_increase']:.4f}", flush=True)
    command = command_line("python", "scripts/measure_parts.py")
    write_results(Path(out), command, describe_environment(), entries)


if __name__ == "__main__":
    main()
