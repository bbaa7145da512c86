"""Names, shapes, dtypes and sizes of every tensor in a checkpoint.

A decoder linear with prefix p, N output rows and K input channels, R of them outliers, G normal
groups and B outlier groups a row is stored as

    p.weight_packed   uint8    (N, (K - R) * bits / 8)           codes of the normal channels
    p.weight_scale    float16  (ceil(N / rows_per_scale), G)
    p.outlier_weight  int8 or float16  (N, R)                    if R > 0
    p.outlier_scale   float16  (N, B)                            if R > 0 and outliers are int8
    p.order           int32    (K,)                              if R > 0, except down_proj
    p.bias            as in the source  (N,)                     if the model has it

and all other tensors as in the source. docs/checkpoint-format.md says what the numbers mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from quatom.errors import RecipeError, ShapeError
from quatom.modeling.config import ModelConfig
from quatom.numerics.groups import GroupLayout
from quatom.numerics.packing import packed_bytes
from quatom.recipe import Recipe

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that unquantized tensors may have."""

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linears of a decoder block, by name within the block."""

ROW_PARALLEL = ("o_proj", "down_proj")
"""Linears whose input, not output, is cut across tensor-parallel ranks."""

_MIN_OUTLIERS = 32
_GRANULE = 32  # channels; a short last group, an outlier block: kernels read no smaller piece


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a stored tensor must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None: as in the source model, any of `FLOAT_DTYPES`."""

    def bits(self, source_dtype: torch.dtype) -> int:
        """Bits that the tensor takes in a file."""
        return prod(self.shape) * (self.dtype or source_dtype).itemsize * 8


def linear_names(config: ModelConfig) -> Iterator[str]:
    """Prefixes of all decoder linears: model.layers.0.self_attn.q_proj, ..."""
    for layer in range(config.num_layers):
        for linear in LINEARS:
            yield f"model.layers.{layer}.{linear}"


def linear_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """(N, K): output rows and input channels of the linear whose name ends like `name`."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes[_kind(name)]


def has_bias(config: ModelConfig, name: str) -> bool:
    """Whether the linear adds a bias."""
    kind = _kind(name)
    if kind in ("q_proj", "k_proj", "v_proj"):
        return config.qkv_bias
    return config.o_bias if kind == "o_proj" else config.mlp_bias


def float_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the floating-point model, by its Hugging Face name."""
    hidden = (config.hidden_size,)
    tensors = {"model.embed_tokens.weight": TensorSpec((config.vocab_size, config.hidden_size))}
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        tensors[f"{block}.input_layernorm.weight"] = TensorSpec(hidden)
        tensors[f"{block}.post_attention_layernorm.weight"] = TensorSpec(hidden)
        for linear in LINEARS:
            name = f"{block}.{linear}"
            shape = linear_shape(config, name)
            tensors[f"{name}.weight"] = TensorSpec(shape)
            if has_bias(config, name):
                tensors[f"{name}.bias"] = TensorSpec(shape[:1])
    tensors["model.norm.weight"] = TensorSpec(hidden)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = TensorSpec((config.vocab_size, config.hidden_size))
    return tensors


def num_outliers(recipe: Recipe, config: ModelConfig) -> int:
    """Outlier channels of a linear's input, of each tensor-parallel block of row-parallel ones.

    recipe.outliers.channels, but at most the largest power of two that is no more than
    max_fraction * hidden_size, and that at least 32: 64 of SmolLM2's 576, 128 of Llama's 4096.
    """
    if not recipe.quantizes_weights or recipe.outliers.channels == 0:
        return 0
    limit = int(recipe.outliers.max_fraction * config.hidden_size)
    cap = max(_MIN_OUTLIERS, 1 << max(limit, 1).bit_length() - 1)
    return min(recipe.outliers.channels, cap)


def linear_layout(recipe: Recipe, config: ModelConfig, name: str) -> GroupLayout:
    """How the input channels of the linear `name` are cut into groups.

    A float linear is one group of all K channels. Row-parallel linears are laid out in
    recipe.tensor_parallel equal blocks, each of whole groups and with outliers of its own.

    Raises:
        RecipeError: the recipe does not fit the model's sizes.
    """
    kind = _kind(name)
    channels = linear_shape(config, name)[1]
    if not recipe.quantizes_weights:
        return GroupLayout(normal=channels, group_size=channels)
    blocks = recipe.tensor_parallel if kind in ROW_PARALLEL else 1
    if blocks > 1:
        _check_blocks(recipe, config, kind, channels)
    width = channels // blocks
    outliers = num_outliers(recipe, config)
    normal = width - outliers
    inputs = f"{kind} has {channels} input channels"
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


def linear_tensors(recipe: Recipe, config: ModelConfig, name: str) -> dict[str, TensorSpec]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        RecipeError: the recipe does not fit the model's sizes.
    """
    rows, channels = linear_shape(config, name)
    tensors: dict[str, TensorSpec] = {}
    if not recipe.quantizes_weights:
        tensors["weight"] = TensorSpec((rows, channels))
    else:
        layout = linear_layout(recipe, config, name)
        try:
            width = packed_bytes(layout.normal, recipe.weights.bits)
        except ShapeError as error:  # cannot happen for multiples of 32 channels
            raise RecipeError(f"{name}: {error}") from error
        scale_rows = -(-rows // recipe.weights.rows_per_scale)
        tensors["weight_packed"] = TensorSpec((rows, width), torch.uint8)
        tensors["weight_scale"] = TensorSpec((scale_rows, layout.num_normal_groups), torch.float16)
        if layout.outliers:
            is_integer = recipe.outliers.format == "int8"
            dtype = torch.int8 if is_integer else torch.float16
            tensors["outlier_weight"] = TensorSpec((rows, layout.outliers), dtype)
            if is_integer:
                tensors["outlier_scale"] = TensorSpec((rows, layout.outlier_blocks), torch.float16)
            if stores_order(recipe, config, name):
                tensors["order"] = TensorSpec((channels,), torch.int32)
    if has_bias(config, name):
        tensors["bias"] = TensorSpec((rows,))
    return {f"{name}.{suffix}": spec for suffix, spec in tensors.items()}


def stores_order(recipe: Recipe, config: ModelConfig, name: str) -> bool:
    """Whether the linear gathers its input by a stored order.

    down_proj's order is folded into the rows of gate_proj and up_proj.
    """
    return num_outliers(recipe, config) > 0 and _kind(name) != "down_proj"


def key_offset_name(layer: int) -> str:
    """Name of the mean of a layer's keys, stored where `kv_cache.key_offset` subtracts it."""
    return f"model.layers.{layer}.self_attn.k_offset"


def expected_tensors(recipe: Recipe, config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a Quatom checkpoint: no more and no fewer are in its files.

    Raises:
        RecipeError: the recipe does not fit the model's sizes.
    """
    linears = set(linear_names(config))
    tensors: dict[str, TensorSpec] = {}
    if recipe.kv_cache.key_offset != "none":
        for layer in range(config.num_layers):
            shape = (config.num_kv_heads, config.head_dim)
            tensors[key_offset_name(layer)] = TensorSpec(shape, torch.float32)
    for name, spec in float_tensors(config).items():
        prefix, _, suffix = name.rpartition(".")
        if prefix not in linears:
            tensors[name] = spec
        elif suffix == "weight":
            tensors |= linear_tensors(recipe, config, prefix)
    return tensors


def layer_bits_per_weight(
    recipe: Recipe, config: ModelConfig, source_dtype: torch.dtype = torch.float16
) -> dict[str, float]:
    """Stored bits for each weight of every decoder linear: codes, scales, outliers and order.

    Biases are not counted: they are no weights of the matrix and keep the source's dtype.
    """
    bits = {}
    for name in linear_names(config):
        tensors = linear_tensors(recipe, config, name)
        total = sum(s.bits(source_dtype) for n, s in tensors.items() if not n.endswith(".bias"))
        bits[name] = total / prod(linear_shape(config, name))
    return bits


def bits_per_weight(
    recipe: Recipe, config: ModelConfig, source_dtype: torch.dtype = torch.float16
) -> float:
    """Stored bits for each weight, all decoder linears together: see `layer_bits_per_weight`."""
    by_layer = layer_bits_per_weight(recipe, config, source_dtype)
    weights = {name: prod(linear_shape(config, name)) for name in by_layer}
    return sum(by_layer[name] * weights[name] for name in by_layer) / sum(weights.values())


def bits_per_activation(recipe: Recipe, config: ModelConfig) -> float:
    """Bits for each input channel of the decoder linears, scales counted as the float16 they hold.

    The four distinct inputs of a block (q/k/v, o, gate/up, down) weigh by their channels.
    """
    if not recipe.quantizes_activations:
        return 16.0
    outlier_bits = 8 if recipe.outliers.format == "int8" else 16
    bits = channels = 0
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        layout = linear_layout(recipe, config, name)
        scales = 1 if recipe.activations.group_size == -1 else layout.num_normal_groups
        scales += layout.num_outlier_groups if outlier_bits == 8 else 0
        bits += layout.normal * recipe.activations.bits + layout.outliers * outlier_bits
        bits += scales * 16
        channels += layout.channels
    return bits / channels


def bits_per_kv(recipe: Recipe, config: ModelConfig) -> float:
    """Bits for each cached number: codes, and a float16 scale and minimum a token and head."""
    if recipe.kv_cache.format == "float16":
        return 16.0
    return recipe.kv_cache.bits + 32 / config.head_dim


def check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """Raise RecipeError unless the recipe fits every linear of the model."""
    layouts = {linear: linear_layout(recipe, config, linear) for linear in LINEARS}
    if not recipe.quantizes_weights:
        return
    rows_per_scale, blocks = recipe.weights.rows_per_scale, recipe.tensor_parallel
    for linear in LINEARS:
        rows = linear_shape(config, linear)[0]
        if rows % rows_per_scale:
            raise RecipeError(
                f"{_kind(linear)} has {rows} rows, no multiple of weights.rows_per_scale "
                f"{rows_per_scale}: use a recipe with rows_per_scale 1"
            )
    # What down_proj takes in are rows of gate_proj and up_proj, stored block by block.
    down = layouts["mlp.down_proj"]
    parts = down.normal // blocks, down.outliers // blocks
    if blocks > 1 and any(part % rows_per_scale for part in parts):
        raise RecipeError(
            f"a tensor-parallel block of down_proj's input has {parts[0]} normal channels and "
            f"{parts[1]} outliers, which are rows of gate_proj and up_proj: both must be multiples "
            f"of weights.rows_per_scale {rows_per_scale}; use rows_per_scale 1"
        )


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _check_blocks(recipe: Recipe, config: ModelConfig, kind: str, channels: int) -> None:
    blocks = recipe.tensor_parallel
    if channels % blocks:
        raise RecipeError(
            f"{kind} has {channels} input channels, which do not divide into tensor_parallel "
            f"{blocks} equal blocks; change tensor_parallel"
        )
    if config.num_heads % blocks:
        raise RecipeError(
            f"{config.num_heads} attention heads do not divide into tensor_parallel {blocks} equal "
            "blocks; change tensor_parallel"
        )
    rows_per_scale = recipe.weights.rows_per_scale
    if (channels // blocks) % rows_per_scale:
        raise RecipeError(
            f"{kind} has {channels // blocks} input channels in each of {blocks} tensor-parallel "
            f"blocks, which is not a multiple of weights.rows_per_scale {rows_per_scale}: slices "
            "of the layer before it would cut a scale; change rows_per_scale or tensor_parallel"
        )
