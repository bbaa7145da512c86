"""A model under a recipe, resolved: the one place where layouts, names and folds are derived.

`plan(config, recipe)` says for every site of every layer which stored linears share its input, how
the channels of that input are cut into groups, where its order goes, and how it is quantized.
Checkpoint schema and codec, quantizer, model builder, random weights and integrations read this
and nothing else, so they cannot disagree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from quatom.errors import RecipeError
from quatom.families.spec import SITES, Layer, ModelConfig, NormName, RouterTensor, SiteName
from quatom.numerics.groups import GroupLayout, ScaleMode
from quatom.numerics.kv_pages import check_head_dim
from quatom.ops.activations import QuantizeSpec
from quatom.recipe import (
    ActivationSpec,
    IncoherenceSpec,
    KVSpec,
    OutlierSpec,
    Recipe,
    WeightSpec,
)

OrderKind = Literal["none", "gathered", "folded"]
"""How a site's input comes into its channel order: not at all; gathered as it is quantized; or by
the rows of the linears that make it, which are stored in that order."""

ROW_PARALLEL: tuple[SiteName, ...] = ("o", "down", "experts_down")
"""Sites whose linears are cut along their input, not their output, across tensor-parallel ranks."""
MADE_BY: Mapping[SiteName, SiteName] = {"down": "gate_up", "experts_down": "experts_gate_up"}
"""The site whose output rows become a site's input channels, one by one."""
_MIN_OUTLIERS = 32
_GRANULE = 32  # channels; a short last group, an outlier block: kernels read no smaller piece


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """One stored linear of a site."""

    name: str
    """Prefix of its tensors: "model.layers.3.self_attn.q_proj"."""
    first: int
    """Its first row in the joined weight of the site."""
    rows: int
    channels: int
    bias: bool
    experts: int | None = None
    """E: all tensors but `order` have a leading dimension of so many experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (rows, channels), or (E, rows, channels)."""
        return (*self.lead, self.rows, self.channels)

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions before rows: (), or (E,)."""
        return () if self.experts is None else (self.experts,)

    @property
    def kind(self) -> str:
        """The last part of its name, for messages: "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def row_range(self) -> slice:
        """Its rows in the joined weight of the site."""
        return slice(self.first, self.first + self.rows)


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One input of a layer and the linears that read it."""

    name: SiteName
    title: str
    """For messages: "model.layers.3 down"."""
    linears: tuple[LinearPlan, ...]
    """In the order in which their rows are joined."""
    layout: GroupLayout
    """How the input channels are cut, in reordered position."""
    blocks: int
    """Tensor-parallel blocks of the input, each with groups and outliers of its own."""
    order: OrderKind
    repeats_channels: bool
    """Whether the order may hold a channel several times, and others not at all."""
    makes: SiteName | None
    """The site whose input the rows of this one make, where that site's order is folded."""
    quantizes_weights: bool
    weights: WeightSpec
    incoherence: IncoherenceSpec | None
    outliers: OutlierSpec
    activations: ActivationSpec
    input_spec: QuantizeSpec | None
    """How the input is quantized; None: it stays in floating point."""

    @property
    def activation_format(self) -> str:
        """Number format of the input."""
        return self.activations.format

    @property
    def experts(self) -> int | None:
        """E where the weight is (E, N, K): one matrix per expert, one input for all of a token."""
        return self.linears[0].experts

    @property
    def rows(self) -> int:
        """N of the joined weight."""
        return sum(linear.rows for linear in self.linears)

    @property
    def channels(self) -> int:
        """K."""
        return self.layout.channels

    @property
    def bias(self) -> bool:
        """Whether any of the linears adds a bias."""
        return any(linear.bias for linear in self.linears)

    @property
    def block_outliers(self) -> int:
        """Outliers of each tensor-parallel block."""
        return self.layout.outliers // self.blocks

    @property
    def scale_mode(self) -> ScaleMode:
        """How the scales of the input's groups depend on each other."""
        return "group" if self.input_spec is None else self.input_spec.scale_mode


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer under the recipe."""

    index: int
    spec: Layer
    hidden_size: int
    prefix: str
    """Tensors of the layer begin with it: "model.layers.3."."""
    sites: Mapping[SiteName, SitePlan]
    kv_cache: KVSpec

    @property
    def offsets_keys(self) -> bool:
        """Whether the mean of K is subtracted before it is cached.

        It takes the same from every score of a query. Softmax does not see that, but a soft-cap
        of the scores and a sink beside them do: such layers keep their mean.
        """
        attention = self.spec.attention
        seen = attention.logit_softcap is not None or attention.sinks
        return self.kv_cache.key_offset != "none" and not seen

    def router_tensors(self) -> dict[RouterTensor, tuple[str, tuple[int, ...]]]:
        """Name and shape of the float tensors beside routed experts, none without experts."""
        experts = self.spec.experts
        if experts is None:
            return {}
        return {
            tensor: (self.prefix + names[0], experts.shape(tensor, self.hidden_size))
            for tensor, names in experts.tensors.items()
        }

    @property
    def sinks_name(self) -> str:
        """Tensor of attention's sinks, (H,), where there are any."""
        return self.prefix + self.spec.sinks_name

    @property
    def key_offset_name(self) -> str:
        """Tensor of the mean of K, (KV, D) float32, where `offsets_keys`."""
        return f"{self.prefix}self_attn.k_offset"

    def norm_name(self, norm: NormName) -> str:
        """Prefix of the tensors of a norm."""
        return self.prefix + self.spec.norm_names[norm]

    @property
    def qk_norm_names(self) -> tuple[str, str]:
        """Prefixes of the tensors of the norms of q and k."""
        q, k = self.spec.qk_norm_names
        return self.prefix + q, self.prefix + k


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A whole model under the recipe."""

    config: ModelConfig
    recipe: Recipe
    layers: tuple[LayerPlan, ...]

    def sites(self) -> Iterator[SitePlan]:
        """Every site of every layer."""
        for layer in self.layers:
            yield from layer.sites.values()

    def linears(self) -> Iterator[LinearPlan]:
        """Every decoder linear."""
        for site in self.sites():
            yield from site.linears

    @property
    def num_weights(self) -> int:
        """Weights of all decoder linears."""
        return sum(prod(linear.shape) for linear in self.linears())

    def check_cache(self) -> None:
        """Raise ShapeError if the paged cache has no heads of a layer's size: it could not run."""
        for size in {layer.spec.attention.head_dim for layer in self.layers}:
            check_head_dim(size)


def plan(config: ModelConfig, recipe: Recipe) -> ModelPlan:
    """Resolve a recipe for a model.

    Raises:
        RecipeError: the recipe does not fit the model's sizes.
    """
    if any(layer.experts is not None for layer in config.layers):
        _check_experts(recipe)
    _check_overrides(config, recipe)
    return ModelPlan(
        config, recipe, tuple(plan_layer(config, recipe, i) for i in range(config.num_layers))
    )


def plan_layer(config: ModelConfig, recipe: Recipe, index: int) -> LayerPlan:
    """Resolve a recipe for one layer.

    Raises:
        RecipeError: the recipe does not fit the layer's sizes.
    """
    layer = config.layers[index]
    prefix = f"{config.layer_prefix}{index}."
    sites = {
        site: _site(config, recipe.at(index, site), layer, prefix, site) for site in layer.sites
    }
    _check_rows(recipe, sites)
    cache = recipe.at(index).kv_cache
    return LayerPlan(index, layer, config.hidden_size, prefix, sites, cache)


def _site(
    config: ModelConfig, recipe: Recipe, layer: Layer, prefix: str, site: SiteName
) -> SitePlan:
    channels = config.input_channels(layer, site)
    linears, first = [], 0
    for linear in layer.linears[site]:
        name = prefix + linear.name
        linears.append(LinearPlan(name, first, linear.rows, channels, linear.bias, linear.experts))
        first += linear.rows
    blocks = recipe.tensor_parallel if site in ROW_PARALLEL else 1
    layout = _layout(config, recipe, layer, linears[0], blocks)
    order: OrderKind = "none"
    if recipe.orders_channels:
        order = "folded" if site in MADE_BY else "gathered"
    makes = [made for made, maker in MADE_BY.items() if maker == site]
    return SitePlan(
        name=site,
        title=f"{prefix[:-1]} {site}",
        linears=tuple(linears),
        layout=layout,
        blocks=blocks,
        order=order,
        repeats_channels=recipe.channel_splitting is not None,
        makes=makes[0] if makes else None,
        quantizes_weights=recipe.quantizes_weights,
        weights=recipe.weights,
        incoherence=recipe.incoherence,
        outliers=recipe.outliers,
        activations=recipe.activations,
        input_spec=input_spec(recipe.activations, recipe.outliers, layout),
    )


def num_outliers(recipe: Recipe, hidden_size: int) -> int:
    """Outlier channels of a linear's input, or of each tensor-parallel block of it.

    recipe.outliers.channels, but at most the largest power of two that is no more than
    max_fraction * hidden_size, and that at least 32: 64 of SmolLM2's 576, 128 of Llama's 4096.
    """
    if not recipe.quantizes_weights or recipe.outliers.channels == 0:
        return 0
    limit = int(recipe.outliers.max_fraction * hidden_size)
    cap = max(_MIN_OUTLIERS, 1 << max(limit, 1).bit_length() - 1)
    return min(recipe.outliers.channels, cap)


def _layout(
    config: ModelConfig, recipe: Recipe, layer: Layer, linear: LinearPlan, blocks: int
) -> GroupLayout:
    """How the input channels of a site are cut into groups.

    A float weight is one group of all K channels. Row-parallel sites are laid out in
    recipe.tensor_parallel equal blocks, each of whole groups and with outliers of its own.
    """
    channels = linear.channels
    if not recipe.quantizes_weights:
        return GroupLayout(normal=channels, group_size=channels)
    if blocks > 1:
        _check_blocks(recipe, layer, linear)
    width = channels // blocks
    outliers = num_outliers(recipe, config.hidden_size)
    normal = width - outliers
    inputs = f"{linear.kind} has {channels} input channels"
    if blocks > 1:
        inputs += f", {width} in each of {blocks} tensor-parallel blocks"
    if normal < _GRANULE or normal % _GRANULE:
        raise RecipeError(
            f"{inputs}; {width} - {outliers} outliers leaves {normal} normal channels, which must "
            f"be a positive multiple of {_GRANULE}; change outliers.channels"
        )
    group_size = recipe.weights.group_size
    if group_size == -1:
        group_size = normal
    elif blocks > 1 and normal % group_size:
        raise RecipeError(
            f"{inputs}; {width} - {outliers} outliers = {normal} is not a multiple of group_size "
            f"{group_size}, so a group would cross blocks; change group_size, outliers.channels or "
            "tensor_parallel"
        )
    return GroupLayout(
        normal=blocks * normal,
        group_size=min(group_size, normal),
        outliers=blocks * outliers,
        outlier_blocks=blocks if outliers else 1,
    )


def input_spec(
    activations: ActivationSpec, outliers: OutlierSpec, layout: GroupLayout
) -> QuantizeSpec | None:
    """How the input of a site is quantized; None where activations stay as they are."""
    if activations.format == "float16":
        return None
    scale_mode: ScaleMode = "group" if activations.scale_format == "float16" else "multiples"
    if layout.num_normal_groups == 1:
        scale_mode = "group"
    elif activations.group_size == -1:
        scale_mode = "row"
    return QuantizeSpec(
        layout=layout,
        normal=activations.format,
        outlier=outliers.format,
        clip_ratio=activations.clip_ratio,
        rotate=activations.rotation == "hadamard",
        scale_mode=scale_mode,
    )


def _check_overrides(config: ModelConfig, recipe: Recipe) -> None:
    """Raise RecipeError for overrides of layers or sites that the model does not have."""
    count = config.num_layers
    for number, override in enumerate(recipe.overrides):
        if any(last >= count for _, last in override.ranges()):
            raise RecipeError(
                f"overrides[{number}].layers {override.layers!r}: the model has layers 0 to "
                f"{count - 1}"
            )
        for site in override.sites:
            if site not in SITES:
                raise RecipeError(
                    f"overrides[{number}].sites names {site!r}; sites are {', '.join(SITES)}"
                )
            found = [i for i, layer in enumerate(config.layers) if site in layer.sites]
            if not any(override.covers(i, site) for i in found):
                raise RecipeError(
                    f"overrides[{number}] is for {site} of layers {override.layers}, and of the "
                    f"model's {count} layers {len(found)} have that site, none of them among these"
                )


def _check_experts(recipe: Recipe) -> None:
    """Raise RecipeError for what routed experts cannot have."""
    if recipe.tensor_parallel > 1:
        raise RecipeError(
            f"tensor_parallel {recipe.tensor_parallel} cuts the inputs of down projections, and "
            "those of routed experts are not cut: use tensor_parallel 1 for mixtures of experts"
        )
    if recipe.float_target > 0:
        raise RecipeError(
            f"weights.rounder.float_target {recipe.float_target} compares outputs of the "
            "floating-point and of the quantized network token by token, but a token may go to "
            "other experts in each: use 0 for mixtures of experts"
        )


def _check_rows(recipe: Recipe, sites: Mapping[SiteName, SitePlan]) -> None:
    """Raise RecipeError where rows that share a scale would be cut apart."""
    if not recipe.quantizes_weights:
        return
    rows_per_scale, blocks = recipe.weights.rows_per_scale, recipe.tensor_parallel
    for site in sites.values():
        for linear in site.linears:
            if linear.rows % rows_per_scale:
                raise RecipeError(
                    f"{linear.kind} has {linear.rows} rows, no multiple of weights.rows_per_scale "
                    f"{rows_per_scale}: use a recipe with rows_per_scale 1"
                )
        if site.makes is None or blocks == 1:
            continue
        # The rows of this site are stored block by block of the input that they make.
        made = sites[site.makes]
        parts = made.layout.normal // blocks, made.block_outliers
        if any(part % rows_per_scale for part in parts):
            raise RecipeError(
                f"a tensor-parallel block of {made.linears[0].kind}'s input has {parts[0]} normal "
                f"channels and {parts[1]} outliers, which are rows of "
                f"{' and '.join(linear.kind for linear in site.linears)}: both must be multiples "
                f"of weights.rows_per_scale {rows_per_scale}; use rows_per_scale 1"
            )


def _check_blocks(recipe: Recipe, layer: Layer, linear: LinearPlan) -> None:
    blocks, heads = recipe.tensor_parallel, layer.attention.num_heads
    if linear.channels % blocks:
        raise RecipeError(
            f"{linear.kind} has {linear.channels} input channels, which do not divide into "
            f"tensor_parallel {blocks} equal blocks; change tensor_parallel"
        )
    if heads % blocks:
        raise RecipeError(
            f"{heads} attention heads do not divide into tensor_parallel {blocks} equal blocks; "
            "change tensor_parallel"
        )
    width, rows_per_scale = linear.channels // blocks, recipe.weights.rows_per_scale
    if width % rows_per_scale:
        raise RecipeError(
            f"{linear.kind} has {width} input channels in each of {blocks} tensor-parallel blocks, "
            f"which is not a multiple of weights.rows_per_scale {rows_per_scale}: slices of the "
            "layer before it would cut a scale; change rows_per_scale or tensor_parallel"
        )
