"""One decoder block: choose channel orders, round its weights, lay out what is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quatom.checkpoint.schema import key_offset_name, linear_layout, linear_shape
from quatom.errors import QuantizationError
from quatom.loading import FUSED, FloatBlock
from quatom.modeling.config import ModelConfig
from quatom.numerics.clipping import weight_scales
from quatom.numerics.formats import get_format
from quatom.numerics.hadamard import hadamard_block, rotate_groups, rotate_last_axis
from quatom.numerics.packing import pack_bits
from quatom.numerics.reorder import channel_order, sliceable_positions
from quatom.numerics.rounding import (
    RoundedWeight,
    RoundingOptions,
    gptq,
    round_to_nearest,
    shift_to_target,
)
from quatom.quantize.clip_search_triton import weight_scales_triton
from quatom.quantize.gptq_triton import choose_round_columns
from quatom.recipe import Recipe


def place_blocks(recipe: Recipe, place: str) -> int:
    """Tensor-parallel blocks of a place's input: row-parallel layers alone are cut along K."""
    return recipe.tensor_parallel if place in ("o", "down") else 1


def choose_orders(
    scores: Mapping[str, Tensor],  # place -> (K,)
    recipe: Recipe,
    config: ModelConfig,
) -> dict[str, Tensor]:
    """Channel order of every place, (K,) int64 each; empty without outliers."""
    if not recipe.outliers.channels:
        return {}
    orders = {}
    for place in FUSED:
        layout = linear_layout(recipe, config, FUSED[place][0])
        blocks = place_blocks(recipe, place)
        orders[place] = channel_order(scores[place], layout.outliers // blocks, blocks)
    return orders


def rotate_values(block: FloatBlock, recipe: Recipe, config: ModelConfig) -> FloatBlock:
    """Fold the rotation of V, if the recipe has one, into v_proj's rows and o_proj's columns.

    Attention mixes tokens, not channels, so its output is rotated like V, and o_proj undoes it:
    the block computes the same function.
    """
    if recipe.kv_cache.value_rotation == "none":
        return block
    mixed = hadamard_block(config.head_dim)
    first = (config.num_heads + config.num_kv_heads) * config.head_dim  # q and k come before v
    weights, biases = dict(block.weights), dict(block.biases)
    qkv = weights["qkv"].clone()
    qkv[first:] = rotate_last_axis(qkv[first:].t(), mixed).t().to(qkv.dtype)
    weights["qkv"] = qkv
    weights["o"] = rotate_last_axis(weights["o"], mixed).to(qkv.dtype)
    if (bias := biases["qkv"]) is not None:
        biases["qkv"] = torch.cat((bias[:first], rotate_last_axis(bias[first:], mixed))).to(
            bias.dtype
        )
    return replace(block, weights=weights, biases=biases)


def balance_keys(
    block: FloatBlock,
    statistics: Mapping[str, Tensor],  # of `KeyStatistics`
    recipe: Recipe,
    config: ModelConfig,
) -> tuple[FloatBlock, Tensor | None]:
    """Fold the scaling of K, if the recipe has one, into q_proj and k_proj; K's offset after it.

    Rounding puts an error of one size on all channels of a (rotated) head, which a score weighs
    with its query's. Dividing K by l and multiplying q by it leaves scores as they are, and the
    error is least where l**4 = E[k**2] / E[q**2]. One l serves a rotary pair, whose channels mix;
    powers of two change no mantissa.

    Returns:
        the block, and the offset (KV, D) float32 or None where the recipe has none.
    """
    spec = recipe.kv_cache
    offset = statistics["key_mean"] if spec.key_offset == "mean" else None
    if spec.key_scaling == "none":
        return block, offset
    keys, queries = statistics["key_squares"], statistics["query_squares"]  # (KV, D / 2)
    if offset is not None:
        keys = keys - offset.square().unflatten(-1, (2, -1)).sum(dim=-2)
    alive = (keys > 0) & (queries > 0)
    power = torch.where(alive, (keys / queries).log2() / 4, torch.zeros_like(keys)).round()
    scale = power.exp2().repeat(1, 2)  # (KV, D)
    shared = config.num_heads // config.num_kv_heads
    for_queries = scale.repeat_interleave(shared, dim=0)
    rows = torch.cat((for_queries, 1 / scale, torch.ones_like(scale))).flatten()
    weights, biases = dict(block.weights), dict(block.biases)
    weights["qkv"] = (weights["qkv"] * rows.unsqueeze(1)).to(weights["qkv"].dtype)
    if (bias := biases["qkv"]) is not None:
        biases["qkv"] = (bias * rows).to(bias.dtype)
    return (
        replace(block, weights=weights, biases=biases),
        None if offset is None else offset / scale,
    )


def arrange_inputs(
    x: Tensor,  # (..., K)
    place: str,
    orders: dict[str, Tensor],
    recipe: Recipe,
    config: ModelConfig,
) -> Tensor:
    """Channels in reordered position and rotated, as codes of that place represent them."""
    if orders:
        x = x[..., orders[place]]
    if recipe.activations.rotation == "hadamard":
        x = rotate_groups(x, linear_layout(recipe, config, FUSED[place][0])).to(x.dtype)
    return x


def gate_up_rows(order: Tensor) -> Tensor:  # (I,) -> (2 I,)
    """Rows of the fused gate_up weight in the order of down_proj's input."""
    return torch.cat((order, order + order.numel()))


def arrange_block(
    block: FloatBlock, orders: dict[str, Tensor], recipe: Recipe, config: ModelConfig
) -> FloatBlock:
    """Weights with columns arranged like the codes of their inputs.

    The order of down_proj's input is folded into the rows of gate and up, which make that input.
    """
    weights = {
        place: arrange_inputs(weight, place, orders, recipe, config)
        for place, weight in block.weights.items()
    }
    biases = dict(block.biases)
    if orders:
        rows = gate_up_rows(orders["down"])
        weights["gate_up"] = weights["gate_up"][rows]
        if (bias := biases["gate_up"]) is not None:
            biases["gate_up"] = bias[rows]
    return replace(block, weights=weights, biases=biases)


@dataclass(frozen=True, slots=True)
class RoundedPlace:
    """The fused linear of one place after rounding, and its squared relative output error."""

    weight: RoundedWeight
    relative_error: float


def round_place(
    name: str,
    weight: Tensor,  # (N, K) reordered
    second_moment: Tensor | None,  # (K, K)
    target_moment: Tensor | None,  # (N, K); None: the weight's own output is wanted
    recipe: Recipe,
    config: ModelConfig,
    place: str,
) -> RoundedPlace:
    """Round the weights of one place as the recipe says.

    Raises:
        QuantizationError: GPTQ cannot invert the second moments and the recipe says to stop, or
            the result is not finite.
    """
    spec = recipe.weights
    options = RoundingOptions(
        normal=get_format(spec.format),
        outlier=get_format(recipe.outliers.format),
        clip_ratio=spec.clip_ratio,
        clip_search=spec.clip_search,
        rows_per_scale=spec.rows_per_scale,
        damping=spec.damping,
        column_order=spec.column_order,
        scale_format=spec.scale_format,
        find_scales=weight_scales_triton if weight.is_cuda else weight_scales,
    )
    layout = linear_layout(recipe, config, FUSED[place][0])
    importance = None if second_moment is None else second_moment.diagonal()
    if spec.rounding == "nearest" or second_moment is None:
        rounded = round_to_nearest(weight, layout, options, importance)
    else:
        try:
            if target_moment is not None:
                weight = shift_to_target(
                    weight, second_moment, target_moment, spec.damping, spec.target_strength
                )
            formats = (options.normal, options.outlier) if layout.outliers else (options.normal,)
            rounded = gptq(
                weight,
                layout,
                options,
                second_moment,
                choose_round_columns(weight.device, formats),
            )
        except QuantizationError as error:
            if recipe.on_singular == "error":
                raise QuantizationError(
                    f"{name}: {error}; give more calibration text, raise weights.damping "
                    f"(now {spec.damping}), or allow on_singular='nearest'"
                ) from error
            rounded = round_to_nearest(weight, layout, options, importance)
    return RoundedPlace(rounded, _relative_error(weight, rounded, second_moment))


def _relative_error(weight: Tensor, rounded: RoundedWeight, moment: Tensor | None) -> float:
    """||(W - Q) X|| / ||W X|| over the calibration inputs, or of the weights alone."""
    weight = weight.float()
    error = weight - rounded.dequantize()
    if moment is None:
        cost, size = error.square().sum(), weight.square().sum()
    else:
        cost, size = ((error @ moment) * error).sum(), ((weight @ moment) * weight).sum()
    # Inputs or weights that are all zero lose nothing; 0 / 0 would be a NaN in the report.
    return max((cost / size).item(), 0.0) ** 0.5 if size > 0 else 0.0


def stored_tensors(
    index: int,
    block: FloatBlock,
    rounded: dict[str, RoundedPlace],
    orders: dict[str, Tensor],
    recipe: Recipe,
    config: ModelConfig,
    key_offset: Tensor | None = None,  # (KV, D)
) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds of block `index`, by its full name; on the CPU."""
    prefix = f"model.layers.{index}."
    tensors = {
        f"{prefix}input_layernorm.weight": block.input_norm,
        f"{prefix}post_attention_layernorm.weight": block.post_norm,
    }
    if key_offset is not None:
        tensors[key_offset_name(index)] = key_offset
    normal, outlier = get_format(recipe.weights.format), get_format(recipe.outliers.format)
    for place, names in FUSED.items():
        weight, bias = rounded[place].weight, block.biases[place]
        values, scales, layout = weight.values, weight.scales, weight.layout
        if place == "gate_up":
            rows = _sliceable_rows(recipe, config).to(values.device)
            values, scales = values[rows], scales[rows]
            bias = None if bias is None else bias[rows]
        blocks = place_blocks(recipe, place)
        first = 0
        for name in names:
            own = slice(first, first + linear_shape(config, name)[0])
            first = own.stop
            part, part_scales = values[own], scales[own]
            key = prefix + name
            patterns = normal.encode(part[:, : layout.normal])
            tensors[f"{key}.weight_packed"] = pack_bits(patterns, normal.bits)
            tensors[f"{key}.weight_scale"] = part_scales[
                :: recipe.weights.rows_per_scale, : layout.num_normal_groups
            ]
            if layout.outliers:
                kept = part[:, layout.normal :]
                if outlier.is_quantized:
                    tensors[f"{key}.outlier_weight"] = kept.to(torch.int8)
                    tensors[f"{key}.outlier_scale"] = part_scales[:, layout.num_normal_groups :]
                else:
                    tensors[f"{key}.outlier_weight"] = kept.half()
                if place != "down":
                    positions = sliceable_positions(
                        layout.channels, layout.outliers // blocks, blocks
                    )
                    tensors[f"{key}.order"] = orders[place].cpu()[positions].int()
            if bias is not None:
                tensors[f"{key}.bias"] = bias[own]
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _sliceable_rows(recipe: Recipe, config: ModelConfig) -> Tensor:
    layout = linear_layout(recipe, config, "mlp.down_proj")
    blocks = recipe.tensor_parallel
    rows = sliceable_positions(layout.channels, layout.outliers // blocks, blocks)
    return gate_up_rows(rows)
