"""A folder and a device -> a model with its weights, floating-point or quantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource, open_source
from quatom.checkpoint.schema import has_bias, key_offset_name, linear_layout, linear_shape
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.errors import BackendError, CheckpointError, ShapeError
from quatom.modeling.config import ModelConfig
from quatom.modeling.inputs import InputQuantizer, activation_spec
from quatom.modeling.linear import FloatLinear, QuantizedLinear
from quatom.modeling.llama import BlockInputs, Decoder, DecoderBlock
from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.numerics.packing import unpack_bits
from quatom.numerics.reorder import check_order, inverse_order, sliceable_positions
from quatom.ops.backend import Backend
from quatom.ops.linear import prepare_weights
from quatom.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Linears that share an input are fused along their output rows.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears of a block by the place whose input they share, in the order of their fused rows."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with what belongs to it."""

    model: Decoder
    config: ModelConfig
    recipe: Recipe
    tokenizer: "PreTrainedTokenizerBase | None"
    device: torch.device
    dtype: torch.dtype
    source: str
    source_dtype: torch.dtype
    """Of the tensors that are not quantized, as stored."""

    @property
    def backend_name(self) -> str:
        """The backend that multiplies the decoder's linears; "torch" where they are float."""
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                return str(module.prepared.backend)
        return "torch"

    def require_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            CheckpointError: the folder has none.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.source} has no tokenizer files: copy the model's own into the folder, or "
                "give token ids"
            )
        return self.tokenizer


@dataclass(frozen=True, slots=True)
class FloatBlock:
    """Weights of one decoder block in floating point, linears fused by shared input."""

    input_norm: Tensor  # (hidden,)
    post_norm: Tensor  # (hidden,)
    weights: dict[str, Tensor]  # place -> (N, K)
    biases: dict[str, Tensor | None]  # place -> (N,)


def load_float_block(
    source: TensorSource, index: int, device: torch.device, dtype: torch.dtype
) -> FloatBlock:
    """Read block `index` of a floating-point model."""
    config = source.model_config
    prefix = f"model.layers.{index}."

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        return source.load(prefix + name, shape).to(device=device, dtype=dtype)

    weights, biases = {}, {}
    for place, names in FUSED.items():
        weights[place] = torch.cat(
            [read(f"{name}.weight", linear_shape(config, name)) for name in names]
        )
        biases[place] = (
            torch.cat([read(f"{name}.bias", linear_shape(config, name)[:1]) for name in names])
            if has_bias(config, names[0])
            else None
        )
    return FloatBlock(
        input_norm=read("input_layernorm.weight", (config.hidden_size,)),
        post_norm=read("post_attention_layernorm.weight", (config.hidden_size,)),
        weights=weights,
        biases=biases,
    )


def place_layouts(recipe: Recipe, config: ModelConfig) -> dict[str, GroupLayout]:
    """GroupLayout of the input of each place."""
    return {place: linear_layout(recipe, config, names[0]) for place, names in FUSED.items()}


def build_float_block(
    config: ModelConfig,
    recipe: Recipe,
    block: FloatBlock,
    orders: Mapping[str, Tensor] | None = None,
    backend: Backend | None = None,
    key_offset: Tensor | None = None,  # (KV, D) float32
) -> DecoderBlock:
    """A block with floating-point linears; its inputs and KV cache as `recipe` says.

    With a recipe that quantizes activations this is the network that calibration runs: weights
    (already in reordered position) as they are, inputs quantized.
    """
    layouts = place_layouts(recipe, config)
    orders = orders or {}
    inputs = {
        place: InputQuantizer(activation_spec(recipe, layouts[place]), orders.get(place), backend)
        for place in FUSED
    }
    linears = {place: FloatLinear(block.weights[place], block.biases[place]) for place in FUSED}
    return DecoderBlock(
        config,
        recipe.kv_cache,
        input_norm=block.input_norm,
        post_norm=block.post_norm,
        inputs=BlockInputs(**inputs),
        key_offset=key_offset,
        backend=backend,
        **linears,
    )


def load_quantized_linear(
    source: TensorSource, recipe: Recipe, prefix: str
) -> tuple[Tensor, Tensor]:
    """Values (N, K) float32 in units of the scales, and scales (N, S) float16, of one linear."""
    config = source.model_config
    rows = linear_shape(config, prefix)[0]
    layout = linear_layout(recipe, config, prefix)
    normal = get_format(recipe.weights.format)
    packed = source.load(f"{prefix}.weight_packed", (rows, layout.normal * normal.bits // 8))
    values = [normal.decode(unpack_bits(packed, normal.bits))]
    pairs = -(-rows // recipe.weights.rows_per_scale)
    scales = [
        source.load(f"{prefix}.weight_scale", (pairs, layout.num_normal_groups)).repeat_interleave(
            recipe.weights.rows_per_scale, dim=0
        )[:rows]
    ]
    if layout.outliers:
        values.append(source.load(f"{prefix}.outlier_weight", (rows, layout.outliers)).float())
        groups = (rows, layout.outlier_blocks)
        scales.append(
            torch.ones(groups, dtype=torch.float16)
            if recipe.outliers.format == "float16"
            else source.load(f"{prefix}.outlier_scale", groups)
        )
    return torch.cat(values, dim=1), torch.cat(scales, dim=1)


def quantized_place(
    recipe: Recipe,
    layout: GroupLayout,
    values: Tensor,  # (N, K) float32 in units of the scales
    scales: Tensor,  # (N, S) float16
    bias: Tensor | None,  # (N,)
    order: Tensor | None,  # (K,)
    backend: Backend | None,
) -> tuple[QuantizedLinear, InputQuantizer]:
    """A linear of codes and the quantizer of its input, in the byte layout it reads."""
    spec = activation_spec(recipe, layout)
    prepared = prepare_weights(
        values,
        scales,
        layout,
        bias=bias,
        weight_format=recipe.weights.format,
        activation_format=recipe.activations.format,
        outlier_format=recipe.outliers.format,
        scale_mode="group" if spec is None else spec.scale_mode,
        backend=backend,
    )
    if spec is not None:
        spec = prepared.input_spec(spec)
    order = None if order is None else order.to(values.device)
    return QuantizedLinear(prepared), InputQuantizer(spec, order, backend)


def load_quantized_block(
    source: TensorSource,
    recipe: Recipe,
    index: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend | None,
) -> DecoderBlock:
    """Read block `index` of a Quatom checkpoint and repack it for the backend."""
    config = source.model_config
    layouts = place_layouts(recipe, config)
    prefix = f"model.layers.{index}."
    offset = None
    if recipe.kv_cache.key_offset != "none":
        offset = source.load(key_offset_name(index)).to(device)
    linears, inputs = {}, {}
    for place, names in FUSED.items():
        parts = [load_quantized_linear(source, recipe, prefix + name) for name in names]
        values, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        bias = None
        if has_bias(config, names[0]):
            bias = torch.cat(
                [
                    source.load(f"{prefix}{name}.bias", linear_shape(config, name)[:1])
                    for name in names
                ]
            ).to(dtype)
        if place == "gate_up":
            rows = fused_rows(recipe, config)
            values, scales = values[rows], scales[rows]
            bias = None if bias is None else bias[rows]
        linears[place], inputs[place] = quantized_place(
            recipe,
            layouts[place],
            values.to(device),
            scales.to(device),
            None if bias is None else bias.to(device),
            load_order(source, recipe, prefix, place),
            backend,
        )
    return DecoderBlock(
        config,
        recipe.kv_cache,
        input_norm=source.load(prefix + "input_layernorm.weight").to(device, dtype),
        post_norm=source.load(prefix + "post_attention_layernorm.weight").to(device, dtype),
        inputs=BlockInputs(**inputs),
        key_offset=offset,
        backend=backend,
        **linears,
    )


def fused_rows(recipe: Recipe, config: ModelConfig) -> Tensor:
    """Row of the stored gate_up weight at each row that down_proj's operation order wants.

    Stored rows are sliceable by tensor-parallel block; the operation has all outliers last.
    """
    layout = linear_layout(recipe, config, "mlp.down_proj")
    blocks = recipe.tensor_parallel
    positions = sliceable_positions(layout.channels, layout.outliers // blocks, blocks)
    rows = inverse_order(positions)
    return torch.cat((rows, rows + layout.channels))


def load_order(source: TensorSource, recipe: Recipe, prefix: str, place: str) -> Tensor | None:
    """Channel order of a place's input as operations want it, or None where there is none.

    Raises:
        CheckpointError: linears that share the input carry different orders, or no permutation.
    """
    layout = linear_layout(recipe, source.model_config, FUSED[place][0])
    if place == "down" or not layout.outliers:
        return None
    orders = [source.load(f"{prefix}{n}.order", (layout.channels,)) for n in FUSED[place]]
    if any(not torch.equal(orders[0], other) for other in orders[1:]):
        raise CheckpointError(
            f"{source.folder}: {prefix}{FUSED[place]} share an input but carry different orders; "
            "the checkpoint is damaged: quantize again"
        )
    try:
        check_order(orders[0], layout.channels)
    except ShapeError as error:
        raise CheckpointError(
            f"{source.folder}: {prefix}{FUSED[place][0]}.order is damaged ({error}): quantize again"
        ) from error
    blocks = recipe.tensor_parallel if place == "o" else 1
    positions = sliceable_positions(layout.channels, layout.outliers // blocks, blocks)
    return orders[0][inverse_order(positions)]


def usable_device(device: str | torch.device) -> torch.device:
    """The device, checked.

    Raises:
        BackendError: it is neither the CPU nor a GPU that torch sees.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {device!r}: use cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported: use cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for but torch sees no GPU: use cpu")
    return place


def default_dtype(source: TensorSource, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU the dtype of the source's weights, bfloat16 for float32 ones."""
    if device.type == "cpu":
        return torch.float32
    dtype = source.dtype("model.embed_tokens.weight")
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _tokenizer(source: TensorSource) -> "PreTrainedTokenizerBase | None":
    """None where the folder holds no tokenizer: token ids still work."""
    if source.gguf is None and not any(source.folder.glob("tokenizer*")):
        return None
    return tokenizer_from_source(source)


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder, hub id, GGUF or Quatom checkpoint.

    Args:
        source: folder, file or hub id.
        device: where the model runs.
        dtype: of activations and of what is not quantized; None: float32 on a CPU, otherwise the
            checkpoint's own.
        backend: implementation of the operations; None picks by device.

    Raises:
        CheckpointError: something is missing, damaged or of a wrong shape.
        ModelError: the architecture or a configuration key is not supported.
        BackendError: the device is not available.
    """
    device = usable_device(device)
    opened = open_source(source)
    dtype = dtype or default_dtype(opened, device)
    config, recipe = opened.model_config, opened.recipe or PRESETS["fp16"]
    blocks = [
        load_quantized_block(opened, recipe, index, device, dtype, backend)
        if opened.recipe is not None and recipe.quantizes_weights
        else build_float_block(
            config, recipe, load_float_block(opened, index, device, dtype), backend=backend
        )
        for index in range(config.num_layers)
    ]

    def outer(name: str, *shape: int) -> Tensor:
        return opened.load(name, shape).to(device=device, dtype=dtype)

    vocab = (config.vocab_size, config.hidden_size)
    model = Decoder(
        config,
        recipe.kv_cache,
        embedding=outer("model.embed_tokens.weight", *vocab),
        blocks=blocks,
        final_norm=outer("model.norm.weight", config.hidden_size),
        head=None if config.tie_word_embeddings else outer("lm_head.weight", *vocab),
        backend=backend,
    )
    return LoadedModel(
        model=model.eval(),
        config=config,
        recipe=recipe,
        tokenizer=_tokenizer(opened),
        device=device,
        dtype=dtype,
        source=str(source),
        source_dtype=opened.dtype("model.embed_tokens.weight"),
    )
