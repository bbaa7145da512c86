"""What the error of each place costs, measured in one walk over the blocks.

The floating-point network runs on some sequences. Each block is then quantized as the base recipe
says, on the floating-point inputs that it has there, and its output's error is measured; and again
for every option of the block's places, all else as in the base. Errors of independent roundings
add up as squares, so what an option saves is a part of the block's squared error.

Blocks differ in what an error of their output does. So the output of each quantized block goes on
through the floating-point blocks behind it, up to the logits: the KL divergence from the model's
own is what the block's whole error costs. An option gains the share of it that it saves of the
squared error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from quatom.checkpoint.reader import TensorSource
from quatom.evaluation.output_head import OutputHead
from quatom.families.spec import SiteName
from quatom.loading import load_float_layer
from quatom.modeling.block import DecoderBlock
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.modeling.weights import FloatLayer, LayerWeights, SiteCodes
from quatom.ops.backend import Backend
from quatom.plan import LayerPlan, ModelPlan, plan
from quatom.presets import PRESETS
from quatom.quantize.finite import check_finite_block
from quatom.quantize.host_memory import return_free_memory
from quatom.quantize.lanes import Share
from quatom.quantize.measure import measure_channels, measure_moments
from quatom.quantize.rounding import round_layer
from quatom.quantize.statistics import run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.walk import embed
from quatom.recipe import WeightSpec
from quatom.search.options import Option, Place

LOGIT_ROWS = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured, in nats per token."""

    divergences: tuple[float, ...]
    """KL divergence of the network in which this block alone is quantized, of each block."""
    gains: tuple[tuple[float, ...], ...]
    """What each option of each place takes off its block's divergence."""


class SensitivityWalk:
    """Measures the places of one model."""

    def __init__(
        self,
        source: TensorSource,
        resolved: ModelPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend | None = None,
    ) -> None:
        """Prepare a walk over `source` under the base recipe's plan."""
        self.source, self.plan, self.recipe = source, resolved, resolved.recipe
        self.device, self.dtype, self.backend = device, dtype, backend
        self.float_plan = plan(resolved.config, PRESETS["fp16"])
        self.transforms = transforms_of(self.recipe)

    @torch.no_grad()
    def measure(
        self,
        tokens: Tensor,  # (sequences, length) int64
        held_out: int,
        places: Sequence[Place],
        on_block: Callable[[int, int], None] | None = None,
    ) -> Sensitivity:
        """Walk over all blocks.

        Args:
            tokens: the text. Statistics are those of its first sequences.
            held_out: errors are measured on so many sequences at its end.
            places: what to try, layer by layer.
            on_block: called with (blocks done, blocks in all).

        Raises:
            QuantizationError: a block cannot be quantized, or gives numbers that are not finite.
        """
        config = self.plan.config
        rotary = RotaryTables(config, tokens.shape[1], self.device)
        hidden = embed(self.source, tokens, self.device, self.dtype)
        wrong = hidden.new_empty((0, *hidden[-held_out:].shape))  # after each block so far
        shares: list[tuple[float, ...]] = []
        for index, layer in enumerate(self.plan.layers):
            block = _Block(self, layer, hidden[:-held_out], rotary)
            entering, hidden = hidden, run_block(block.float_module, hidden, rotary)
            check_finite_block(hidden, index, "in floating point", self.dtype)
            wrong = run_block(block.float_module, wrong.flatten(0, 1), rotary).view(wrong.shape)
            ours = run_block(block.base, entering[-held_out:], rotary)
            check_finite_block(ours, index, "after quantization", self.dtype)
            target = hidden[-held_out:]
            error = squared_error(ours, target)
            for place in (place for place in places if place.layer == index):
                found = []
                for option in place.options:
                    tried = run_block(block.raised(option), entering[-held_out:], rotary)
                    saved = error - squared_error(tried, target)
                    found.append(saved / error if error else 0.0)
                shares.append(tuple(found))
            wrong = torch.cat((wrong, ours.unsqueeze(0)))
            if on_block is not None:
                on_block(index + 1, config.num_layers)
            del block
            return_free_memory()
        divergences = self._divergences(hidden[-held_out:], wrong)
        return Sensitivity(
            divergences,
            tuple(
                tuple(divergences[place.layer] * share for share in own)
                for place, own in zip(places, shares, strict=True)
            ),
        )

    def _divergences(
        self,
        target: Tensor,  # (sequences, length, hidden)
        wrong: Tensor,  # (blocks, sequences, length, hidden)
    ) -> tuple[float, ...]:
        head = OutputHead(self.source, self.device, self.dtype, self.backend)
        rows, others = target.flatten(0, 1), wrong.flatten(1, 2)
        sums = torch.zeros(len(wrong), dtype=torch.float64)
        for piece in torch.arange(len(rows)).split(LOGIT_ROWS):
            wanted = head.logits(head.norm(rows[piece])).log_softmax(dim=-1)
            for number, states in enumerate(others):
                found = head.logits(head.norm(states[piece])).log_softmax(dim=-1)
                sums[number] += float(kl_div(found, wanted, reduction="sum", log_target=True))
        return tuple((sums / len(rows)).tolist())


class _Block:
    """One block: in floating point, under the base recipe, and with options raised."""

    def __init__(
        self, walk: SensitivityWalk, layer: LayerPlan, hidden: Tensor, rotary: RotaryTables
    ) -> None:
        self.walk, self.layer, self.hidden, self.rotary = walk, layer, hidden, rotary
        weights = load_float_layer(walk.source, layer, walk.device, walk.dtype)
        self.prepared = walk.transforms.prepare(layer, weights)
        float_layer = walk.float_plan.layers[layer.index]
        self.float_module = build_block(float_layer, self.prepared, walk.backend)
        _, self.statistics = measure_channels(self.float_module, hidden, rotary, walk.recipe)
        self.arranged = self._arranged(layer)
        self.moments = self._moments(layer, self.arranged)
        self.codes = self._round(layer, self.arranged, self.moments, tuple(layer.sites))
        self.base = self._build(layer, self.codes)
        self._rounded: dict[tuple[SiteName, WeightSpec], SiteCodes] = {}

    def raised(self, option: Option) -> DecoderBlock:
        """The block with an option, the weights of other places as they are in `base`."""
        layer, codes = option.layer, dict(self.codes)
        own = layer.sites
        cut = [name for name in own if own[name].layout != self.layer.sites[name].layout]
        if cut:  # channels are in another order, and so are the rows that make them
            redone = tuple(name for name in own if name in cut or own[name].makes in cut)
            arranged = self._arranged(layer)
            codes |= self._round(layer, arranged, self._moments(layer, arranged), redone)
        for name in own:
            if name not in cut and own[name].weights != self.layer.sites[name].weights:
                key = name, own[name].weights
                if key not in self._rounded:  # for other formats of its input it is the same
                    found = self._round(layer, self.arranged, self.moments, (name,))
                    self._rounded[key] = found[name]
                codes[name] = self._rounded[key]
        return self._build(layer, codes)

    def _arranged(self, layer: LayerPlan) -> FloatLayer:
        return self.walk.transforms.finish(layer, self.prepared, self.statistics)

    def _moments(self, layer: LayerPlan, arranged: FloatLayer) -> dict[str, Tensor]:
        walk = self.walk
        if not walk.recipe.needs_moments:
            return {}
        moments, _ = measure_moments(
            build_block(layer, arranged, walk.backend),
            self.hidden,
            self.rotary,
            tf32=walk.dtype != torch.float32,
            bound=walk.recipe.calibration.min_expert_tokens,
        )
        return moments

    def _round(
        self,
        layer: LayerPlan,
        arranged: FloatLayer,
        moments: dict[str, Tensor],
        sites: tuple[SiteName, ...],
    ) -> dict[SiteName, SiteCodes]:
        own = replace(layer, sites={name: layer.sites[name] for name in sites})
        floats = {name: arranged.sites[name] for name in sites}
        found = {name: moments[name] for name in sites if name in moments}
        share, walk = Share.of_one(self.hidden), self.walk
        codes, _, _ = round_layer(own, floats, found, {}, walk.recipe, share, walk.device)
        return codes

    def _build(self, layer: LayerPlan, codes: dict[SiteName, SiteCodes]) -> DecoderBlock:
        rest = self.arranged
        weights = LayerWeights(
            norms=rest.norms,
            sites=codes,
            qk_norm=rest.qk_norm,
            key_offset=rest.key_offset,
            sinks=rest.sinks,
            router=rest.router,
        )
        return build_block(layer, weights, self.walk.backend)


def squared_error(ours: Tensor, target: Tensor) -> float:
    """Mean over tokens of ||ours - target||**2 / ||target||**2; both (..., hidden).

    By token: a few tokens of huge activations would decide a common sum alone.
    """
    error = (ours.float() - target.float()).square().sum(dim=-1)
    size = target.float().square().sum(dim=-1)
    return float((error / size.clamp(min=torch.finfo(torch.float32).tiny)).double().mean())
