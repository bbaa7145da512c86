"""What the error of each place costs, measured in one walk over the blocks.

The floating-point network runs on some sequences. Each block is then quantized as the base recipe
says, on the floating-point inputs that it has there, and its output's error is measured; and again
for every option of the block's places, all else as in the base. Errors of independent roundings
add up as squares, so what an option saves is a part of the block's squared error.

Blocks differ in what an error of their output does. So the output of each quantized block goes on
through the floating-point blocks after it, up to the logits: the KL divergence from the model's
own is what the block's whole error costs. An option gains the share of it that it saves of the
squared error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from quatom.checkpoint.reader import TensorSource
from quatom.evaluation.output_head import OutputHead
from quatom.modeling.rotary import RotaryTables
from quatom.ops.backend import Backend
from quatom.plan import ModelPlan, plan
from quatom.presets import PRESETS
from quatom.quantize.finite import check_finite_block
from quatom.quantize.host_memory import return_free_memory
from quatom.quantize.statistics import run_block
from quatom.quantize.transforms import transforms_of
from quatom.quantize.walk import embed
from quatom.search.block import MeasuredBlock, Setting
from quatom.search.options import Place

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
        self.plan = resolved
        recipe, floats = resolved.recipe, plan(resolved.config, PRESETS["fp16"])
        transforms = transforms_of(recipe)
        self.setting = Setting(source, recipe, transforms, floats, device, dtype, backend)

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
        config, setting = self.plan.config, self.setting
        rotary = RotaryTables(config, tokens.shape[1], setting.device)
        hidden = embed(setting.source, tokens, setting.device, setting.dtype)
        wrong = hidden.new_empty((0, *hidden[-held_out:].shape))  # after each block so far
        shares: list[tuple[float, ...]] = []
        for index, layer in enumerate(self.plan.layers):
            block = MeasuredBlock(setting, layer, hidden[:-held_out], rotary)
            entering, hidden = hidden, run_block(block.float_module, hidden, rotary)
            check_finite_block(hidden, index, "in floating point", setting.dtype)
            wrong = run_block(block.float_module, wrong.flatten(0, 1), rotary).view(wrong.shape)
            ours = run_block(block.base, entering[-held_out:], rotary)
            check_finite_block(ours, index, "after quantization", setting.dtype)
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
        setting = self.setting
        head = OutputHead(setting.source, setting.device, setting.dtype, setting.backend)
        rows, others = target.flatten(0, 1), wrong.flatten(1, 2)
        sums = torch.zeros(len(wrong), dtype=torch.float64)
        for piece in torch.arange(len(rows)).split(LOGIT_ROWS):
            wanted = head.logits(head.norm(rows[piece])).log_softmax(dim=-1)
            for number, states in enumerate(others):
                found = head.logits(head.norm(states[piece])).log_softmax(dim=-1)
                sums[number] += float(kl_div(found, wanted, reduction="sum", log_target=True))
        return tuple((sums / len(rows)).tolist())


def squared_error(ours: Tensor, target: Tensor) -> float:
    """Mean over tokens of ||ours - target||**2 / ||target||**2; both (..., hidden).

    By token: a few tokens of huge activations would decide a common sum alone.
    """
    error = (ours.float() - target.float()).square().sum(dim=-1)
    size = target.float().square().sum(dim=-1)
    return float((error / size.clamp(min=torch.finfo(torch.float32).tiny)).double().mean())
