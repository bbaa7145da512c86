"""A mixture of experts in which every expert has outlier channels of its own.

What quantizing it costs: with one order of a layer's down inputs, with one per expert, and with
expert 0's for all (as the original does); with statistics of few routed tokens, blended or not.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource, open_source
from quatom.loading import load_float_layer
from quatom.modeling.block import summed
from quatom.modeling.build import build_block
from quatom.modeling.rotary import RotaryTables
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.measure import measure_channels
from quatom.quantize.walk import BlockQuantizer, Streams
from quatom.recipe import Recipe
from tests.families.models import COMMON, model_class

EXPERTS, OUTLIERS, FACTOR, RARE = 4, 16, 20.0, 3
CPU = torch.device("cpu")


def planted(folder: Path, *, rarity: float = 0.0, seed: int = 0) -> TensorSource:
    """Mixtral of one layer: 4 experts, 16 rows of each up projection 20 times larger."""
    import transformers

    config = transformers.MixtralConfig(
        **COMMON | {"num_hidden_layers": 1, "num_local_experts": EXPERTS, "hidden_size": 256}
    )
    torch.manual_seed(seed)
    model = model_class("Mixtral")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        experts = model.model.layers[0].mlp.experts
        size = experts.down_proj.shape[2]
        # All inputs have a large first channel, which keeps most of them from expert RARE.
        model.model.layers[0].mlp.gate.weight[RARE, 0] = -rarity
        for expert in range(EXPERTS):
            rows = size + torch.randperm(size)[:OUTLIERS]
            experts.gate_up_proj[expert, rows] *= FACTOR
    model.save_pretrained(folder)
    return open_source(folder)


def random_hidden(tokens: int, seed: int) -> Tensor:
    """(1, tokens, 256), the first channel large in all."""
    hidden = torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(seed))
    hidden[..., 0] += 3.0
    return hidden


def orders(scores: Tensor, kind: str) -> Tensor:
    """Scores (E, K) of every expert's channels, as an order of this kind sees them."""
    return {
        "per expert": scores,
        "per layer": scores.sum(dim=0, keepdim=True).expand_as(scores),
        "expert 0's": scores[:1].expand_as(scores),
    }[kind]


def quantization_error(
    source: TensorSource,
    recipe: Recipe,
    *,
    order: str = "per expert",
    calibration: Tensor,
    held_out: Tensor,  # (1, T, 256)
    of_expert: int | None = None,
) -> float:
    """||quantized - float|| / ||float|| of what experts give for tokens not calibrated on.

    Both read the same input, and so both routers choose alike: attention's errors do not count.
    With `of_expert` only tokens that go to it.
    """
    float_layer = plan(source.model_config, PRESETS["fp16"]).layers[0]
    weights = load_float_layer(source, float_layer, CPU, torch.float32)
    reference = build_block(float_layer, weights)
    _, statistics = measure_channels(
        reference,
        calibration,
        RotaryTables(source.model_config, calibration.shape[1]),
        recipe,
    )
    name = f"{recipe.outliers.metric}.experts_down"
    statistics[name] = orders(statistics[name], order)
    quantizer = BlockQuantizer(
        source,
        plan(source.model_config, recipe),
        device=CPU,
        dtype=torch.float32,
        streams=Streams(None, calibration),
        statistics=[statistics],
    )
    module = quantizer.quantize(0).module
    tokens, nothing = held_out[0], torch.zeros_like(held_out[0])
    normed, _ = reference.norms["feed_forward"](tokens, nothing)
    if of_expert is not None:
        routing = reference.router(normed)
        tokens = tokens[(routing.expert_ids == of_expert).any(dim=1)]
        nothing = torch.zeros_like(tokens)
    want, got = (summed(block._mix(tokens, nothing)[0]) for block in (reference, module))
    return ((got - want).norm() / want.norm()).item()


def with_bound(recipe: Recipe, bound: int) -> Recipe:
    """The recipe with another least number of tokens of an expert."""
    return replace(recipe, calibration=replace(recipe.calibration, min_expert_tokens=bound))
