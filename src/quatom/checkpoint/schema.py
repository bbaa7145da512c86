"""Names, shapes, dtypes and sizes of every tensor in a checkpoint.

A decoder linear with prefix p, N output rows and K input channels, R of them outliers, G normal
groups and B outlier groups per row is stored as

    p.weight_packed   uint8    (N, (K - R) * bits / 8)           codes of the normal channels
    p.weight_scale    float16  (ceil(N / rows_per_scale), G)     unless scales are packed multiples
    p.row_scale       float16  (ceil(N / rows_per_scale),)       if they are
    p.weight_multiple uint8    (ceil(N / rows_per_scale), B * ceil(G / 2 B))   if they are
    p.outlier_weight  int8 or float16  (N, R)                    if R > 0
    p.outlier_scale   float16  (N, B)                            if R > 0 and outliers are int8
    p.order           int32    (K,)                              if the input is gathered by it
    p.bias            as in the source  (N,)                     if the model has it

Of routed experts all but `order` have a leading dimension E. All other tensors, the router's among
them, are as in the source. docs/reference/checkpoint-format.md says what the numbers mean.
"""

from dataclasses import dataclass
from math import prod

import torch

from quatom.errors import RecipeError, ShapeError
from quatom.families.spec import Attention, ModelConfig, Norm
from quatom.numerics.multiples import multiple_bytes
from quatom.numerics.packing import packed_bytes
from quatom.plan import LayerPlan, LinearPlan, ModelPlan, SitePlan

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that unquantized tensors may have."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a stored tensor must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None: as in the source model, any of `FLOAT_DTYPES`."""

    def bits(self, source_dtype: torch.dtype) -> int:
        """Bits that the tensor takes in a file."""
        return prod(self.shape) * (self.dtype or source_dtype).itemsize * 8


def outer_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor outside the decoder layers: embeddings, final norm, head."""
    table = TensorSpec((config.vocab_size, config.hidden_size))
    tensors = {config.embedding_name: table}
    if config.positions is not None:
        tensors[config.positions.name] = TensorSpec((config.positions.rows, config.hidden_size))
    tensors |= norm_tensors(config.final_norm, config.final_norm_name, config.hidden_size)
    if not config.tie_word_embeddings:
        tensors[config.head_name] = table
    if config.head_bias:
        tensors[config.head_bias_name] = TensorSpec((config.vocab_size,))
    return tensors


def norm_tensors(norm: Norm, prefix: str, *shape: int) -> dict[str, TensorSpec]:
    """Weight and, where it has one, bias of a norm."""
    tensors = {f"{prefix}.weight": TensorSpec(shape)}
    if norm.bias:
        tensors[f"{prefix}.bias"] = TensorSpec(shape)
    return tensors


def layer_norms(layer: LayerPlan) -> dict[str, TensorSpec]:
    """Tensors of all norms of a layer."""
    tensors: dict[str, TensorSpec] = {}
    for name, norm in layer.spec.norms.items():
        tensors |= norm_tensors(norm, layer.norm_name(name), layer.hidden_size)
    attention = layer.spec.attention
    if attention.qk_norm is not None:
        for prefix, shape in zip(layer.qk_norm_names, qk_norm_shapes(attention), strict=True):
            tensors |= norm_tensors(attention.qk_norm, prefix, *shape)
    return tensors


def qk_norm_shapes(attention: Attention) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the weights of the norms of q and k."""
    channels = attention.head_dim
    match attention.qk_norm_axis:
        case "head":
            return (channels,), (channels,)
        case "each":
            return (attention.num_heads, channels), (attention.num_kv_heads, channels)
        case "all":
            return (attention.q_size,), (attention.kv_size,)


def float_linear_tensors(linear: LinearPlan) -> dict[str, TensorSpec]:
    """Weight and bias of a linear as the source has them."""
    tensors = {f"{linear.name}.weight": TensorSpec(linear.shape)}
    if linear.bias:
        tensors[f"{linear.name}.bias"] = TensorSpec(linear.shape[:-1])
    return tensors


def linear_tensors(site: SitePlan, linear: LinearPlan) -> dict[str, TensorSpec]:
    """The stored tensors of a linear of the site, by full name."""
    if not site.quantizes_weights:
        return float_linear_tensors(linear)
    layout, weights = site.layout, site.weights
    try:
        width = packed_bytes(layout.normal, weights.bits)
    except ShapeError as error:  # cannot happen for multiples of 32 channels
        raise RecipeError(f"{linear.name}: {error}") from error
    rows, scale_rows = linear.shape[:-1], -(-linear.rows // weights.rows_per_scale)
    groups, scaled = layout.num_normal_groups, (*linear.lead, scale_rows)
    tensors = {"weight_packed": TensorSpec((*rows, width), torch.uint8)}
    if weights.scale_format == "packed_multiples":
        packed = (*scaled, multiple_bytes(groups, site.blocks))
        tensors["row_scale"] = TensorSpec(scaled, torch.float16)
        tensors["weight_multiple"] = TensorSpec(packed, torch.uint8)
    else:
        tensors["weight_scale"] = TensorSpec((*scaled, groups), torch.float16)
    if layout.outliers:
        is_integer = site.outliers.format == "int8"
        dtype = torch.int8 if is_integer else torch.float16
        tensors["outlier_weight"] = TensorSpec((*rows, layout.outliers), dtype)
        if is_integer:
            shape = (*rows, layout.outlier_blocks)
            tensors["outlier_scale"] = TensorSpec(shape, torch.float16)
    if site.order == "gathered":
        tensors["order"] = TensorSpec((site.channels,), torch.int32)
    if linear.bias:
        tensors["bias"] = TensorSpec(rows)
    return {f"{linear.name}.{suffix}": spec for suffix, spec in tensors.items()}


def layer_tensors(layer: LayerPlan) -> dict[str, TensorSpec]:
    """Every stored tensor of a layer."""
    tensors = layer_norms(layer)
    if layer.offsets_keys:
        attention = layer.spec.attention
        shape = (attention.num_kv_heads, attention.head_dim)
        tensors[layer.key_offset_name] = TensorSpec(shape, torch.float32)
    if layer.spec.attention.sinks:
        tensors[layer.sinks_name] = TensorSpec((layer.spec.attention.num_heads,))
    tensors |= {name: TensorSpec(shape) for name, shape in layer.router_tensors().values()}
    for site in layer.sites.values():
        for linear in site.linears:
            tensors |= linear_tensors(site, linear)
    return tensors


def checkpoint_tensors(plan: ModelPlan) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint: no more and no fewer are in its files.

    Of a plan that quantizes no weights these are the tensors of the floating-point model.
    """
    tensors: dict[str, TensorSpec] = {}
    for layer in plan.layers:
        tensors |= layer_tensors(layer)
    return tensors | outer_tensors(plan.config)


def bits_by_linear(plan: ModelPlan, source_dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Stored bits per weight of every decoder linear: codes, scales, outliers and order.

    Biases are not counted: they are no weights of the matrix and keep the source's dtype.
    """
    return {
        linear.name: linear_bits(site, linear, source_dtype) / prod(linear.shape)
        for site in plan.sites()
        for linear in site.linears
    }


def linear_bits(
    site: SitePlan, linear: LinearPlan, source_dtype: torch.dtype = torch.float16
) -> int:
    """Bits that a linear of the site takes in a file, its bias not counted."""
    tensors = linear_tensors(site, linear)
    return sum(s.bits(source_dtype) for n, s in tensors.items() if not n.endswith(".bias"))


def bits_per_weight(plan: ModelPlan, source_dtype: torch.dtype = torch.float16) -> float:
    """Stored bits per weight, all decoder linears together: see `bits_by_linear`."""
    by_linear = bits_by_linear(plan, source_dtype)
    total = sum(by_linear[lin.name] * prod(lin.shape) for lin in plan.linears())
    return total / plan.num_weights


def bits_per_activation(plan: ModelPlan) -> float:
    """Bits per input channel of the decoder linears, scales counted as the float16 they hold.

    Every input of a layer counts once, weighted by its channels.
    """
    sites = list(plan.sites())
    return sum(map(input_bits, sites)) / sum(site.channels for site in sites)


def input_bits(site: SitePlan) -> int:
    """Bits of one token's input of a site."""
    if site.input_spec is None:
        return 16 * site.channels
    layout, is_integer = site.layout, site.outliers.format == "int8"
    scales = 1 if site.activations.group_size == -1 else layout.num_normal_groups
    scales += layout.num_outlier_groups if is_integer else 0
    outliers = layout.outliers * (8 if is_integer else 16)
    return layout.normal * site.activations.bits + outliers + 16 * scales


def bits_per_kv(plan: ModelPlan) -> float:
    """Bits per cached number: codes, and a float16 scale and minimum per token and head."""
    return sum(map(cached_bits, plan.layers)) / sum(cached_numbers(x) for x in plan.layers)


def cached_numbers(layer: LayerPlan) -> int:
    """Numbers of one token's K and V in a layer."""
    return 2 * layer.spec.attention.kv_size


def cached_bits(layer: LayerPlan) -> int:
    """Bits of one token's K and V in a layer."""
    if layer.kv_cache.format == "float16":
        return 16 * cached_numbers(layer)
    heads = 2 * layer.spec.attention.num_kv_heads
    return cached_numbers(layer) * layer.kv_cache.bits + heads * 32
