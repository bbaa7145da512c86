"""A checkpoint of GPTQ, AWQ or llm-compressor in, a Quatom checkpoint with the same weights out.

Codes and scales stay what they are: nothing is rounded. What a recipe cannot say is refused before
anything is written. Asymmetric 4-bit codes minus their zero points lie in -16 to 15, which is INT5.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from quatom.arguments import checked
from quatom.checkpoint.codec import encode_layer
from quatom.checkpoint.packed.linear import Scheme
from quatom.checkpoint.packed.source import PackedSource, open_packed
from quatom.checkpoint.tokenizer import find_tokenizer
from quatom.checkpoint.writer import CheckpointWriter, check_target
from quatom.errors import RecipeError
from quatom.families.spec import SiteName
from quatom.loading import load_float_layer, rotary_rows
from quatom.modeling.weights import LayerWeights, SiteCodes
from quatom.plan import MADE_BY, LayerPlan, LinearPlan, SitePlan, plan
from quatom.presets import PRESETS
from quatom.quantize.pipeline import QuantizeReport, report_of
from quatom.quantize.transforms.order import gather_rows, made_rows, order_columns
from quatom.recipe import (
    ActivationSpec,
    KVSpec,
    NearestSpec,
    OutlierSpec,
    Recipe,
    WeightSpec,
)
from quatom.recipe_formats import WeightFormat

_CPU = torch.device("cpu")


@dataclass(slots=True)
class _Found:
    """What a look at scales, zero points and groups gave."""

    asymmetric: str | None = None
    """The first linear whose zero points are not the middle of the range."""
    orders: dict[tuple[int, SiteName], Tensor] = field(default_factory=dict)
    """Channel order of sites whose groups are not of neighbours, (K,) or (E, K) int64."""


@checked(but=("source",))
@torch.no_grad()
def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    resume: bool = False,
    on_block: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Write a Quatom checkpoint with the codes and scales of another tool's.

    Args:
        source: folder or hub id of a checkpoint of GPTQ, AWQ or compressed-tensors.
        target: folder to write; it must not exist.
        resume: go on with an interrupted run of the same source.
        on_block: called with blocks done and blocks in all, from 0 on. What it raises ends the run
            as in `quantize_checkpoint`.

    Raises:
        ArgumentError: an argument is of another kind than it says here.
        CheckpointError: the source is damaged, the target exists or cannot be written.
        ModelError: the source is of another kind, or the architecture is not supported.
        RecipeError: no recipe says how the source is quantized.
    """
    check_target(target, resume=resume)
    packed = open_packed(source)
    config = packed.source.model_config
    found = _look(packed)
    recipe = _recipe(packed.form.scheme, found)
    resolved = plan(config, recipe)
    find_tokenizer(packed.source)  # read before the work: it is written after it
    with CheckpointWriter(target, packed.source, resolved, resume=resume) as writer:
        if not writer.finished:
            for index in range(writer.completed_blocks(), config.num_layers):
                if on_block is not None:
                    on_block(index, config.num_layers)
                layer = resolved.layers[index]
                weights = _layer_weights(packed, layer, found.orders)
                writer.write_block(index, encode_layer(layer, weights))
            writer.finish()
            if on_block is not None:
                on_block(config.num_layers, config.num_layers)
    return report_of(Path(target), resolved)


def _look(packed: PackedSource) -> _Found:
    """Read everything but codes, so that what cannot be said is known before the work."""
    found = _Found()
    floats = plan(packed.source.model_config, PRESETS["fp16"])
    used: set[str] = set()
    for layer in floats.layers:
        for name, site in layer.sites.items():
            groups: list[list[Tensor | None]] = [[] for _ in range(site.experts or 1)]
            for linear in site.linears:
                for expert, parts in zip(groups, packed.parts(layer, linear), strict=True):
                    for one in parts:
                        used.add(one.name)
                        one.scales()
                        expert.append(one.groups())
                        if found.asymmetric is None and one.zeros() is not None:
                            found.asymmetric = one.name
            if (order := _order(site, groups)) is not None:
                found.orders[layer.index, name] = order
    if others := [name for name in packed.linears if name not in used]:
        raise RecipeError(
            f"{others[0]} is quantized ({len(others)} such linears) and is none of the decoder's "
            "layers: Quatom keeps those in floating point"
        )
    return found


def _order(site: SitePlan, groups: list[list[Tensor | None]]) -> Tensor | None:
    """The channel order of a site that makes its groups neighbours; None: they are.

    Args:
        site: of the floating-point plan.
        groups: of each expert, or the only one, those of every linear: as `PackedLinear.groups`.

    Raises:
        RecipeError: linears that share the input group its channels in different ways.
    """
    if site.name not in MADE_BY:  # experts share one input, and with it one order
        groups = [[group for expert in groups for group in expert]]
    if all(group is None for expert in groups for group in expert):
        return None
    orders = []
    for first, *others in groups:
        if not all(_equal(first, other) for other in others):
            names = ", ".join(linear.kind for linear in site.linears)
            raise RecipeError(
                f"{site.title}: {names} share an input and group its channels in different ways "
                "(g_idx): a recipe has one order of channels for each input"
            )
        neighbours = torch.arange(site.channels)
        orders.append(neighbours if first is None else first.argsort(stable=True))
    return orders[0] if site.experts is None or len(orders) == 1 else torch.stack(orders)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def _recipe(scheme: Scheme, found: _Found) -> Recipe:
    """The recipe of codes that are there.

    Raises:
        RecipeError: no recipe says it.
    """
    bits = scheme.bits
    if found.asymmetric is not None:
        bits += 1
        if bits > 8:
            raise RecipeError(
                f"{found.asymmetric} has {scheme.bits}-bit codes with zero points other than "
                f"{scheme.middle}: their differences take {bits} bits, and weights have at most 8"
            )
    return Recipe(
        name=f"{scheme.method}-w{scheme.bits}a{8 if scheme.activations == 'int8' else 16}",
        weights=WeightSpec(
            format=cast("WeightFormat", f"int{bits}"),
            group_size=scheme.group_size,
            groups="ordered" if found.orders else "consecutive",
            rounder=NearestSpec(),
        ),
        activations=ActivationSpec(format=scheme.activations, group_size=-1),
        kv_cache=KVSpec(format="float16"),
        outliers=OutlierSpec(channels=0),
    )


def _layer_weights(
    packed: PackedSource, layer: LayerPlan, orders: dict[tuple[int, SiteName], Tensor]
) -> LayerWeights:
    held = load_float_layer(packed.source, layer, _CPU, torch.float32)
    rows = rotary_rows(layer.spec.attention)
    own = {
        name: orders.get((layer.index, name), torch.arange(site.channels))
        for name, site in layer.sites.items()
        if site.order != "none"
    }
    sites = {}
    for name, site in layer.sites.items():
        values, bias = held.sites[name].weight.to(torch.int8), held.sites[name].bias
        scales = torch.cat([_scales(packed, layer, linear) for linear in site.linears], dim=-2)
        if name == "qkv" and rows is not None:
            scales = scales[rows]
        if name in own:
            values = order_columns(values, own[name])
        if (made := made_rows(layer, name, own)) is not None:
            values, scales = gather_rows(values, made), gather_rows(scales, made)
            bias = None if bias is None else gather_rows(bias, made)
        sites[name] = SiteCodes(values, scales, bias, own.get(name))
    return LayerWeights(
        norms=held.norms,
        sites=sites,
        qk_norm=held.qk_norm,
        sinks=held.sinks,
        router=held.router,
    )


def _scales(packed: PackedSource, layer: LayerPlan, linear: LinearPlan) -> Tensor:
    """(N, G) float16, or (E, N, G)."""
    experts = [torch.cat([p.scales() for p in parts]) for parts in packed.parts(layer, linear)]
    return experts[0] if linear.experts is None else torch.stack(experts)
