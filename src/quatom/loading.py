"""A folder and a device -> a model with its weights, floating-point or quantized."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quatom.checkpoint.codec import decode
from quatom.checkpoint.reader import TensorSource, open_source
from quatom.checkpoint.schema import bits_per_weight, linear_tensors, qk_norm_shapes
from quatom.checkpoint.tokenizer import find_tokenizer
from quatom.errors import CheckpointError
from quatom.families.spec import Attention, ModelConfig, Norm, NormName, RouterTensor
from quatom.modeling.block import DecoderBlock
from quatom.modeling.build import build_block
from quatom.modeling.decoder import Decoder
from quatom.modeling.linear import QuantizedLinear
from quatom.modeling.weights import FloatLayer, FloatSite, LayerWeights, NormWeights
from quatom.numerics.rotary import head_order
from quatom.ops.backend import Backend
from quatom.placement import default_dtype, usable_backend, usable_device, usable_dtype
from quatom.plan import LayerPlan, ModelPlan, plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[str, tuple[int, ...]], Tensor]
"""A tensor by its name and shape, on the device and in the dtype of the model."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with what belongs to it."""

    model: Decoder
    plan: ModelPlan
    tokenizer: "PreTrainedTokenizerBase | None"
    device: torch.device
    dtype: torch.dtype
    source: str
    source_dtype: torch.dtype
    """Of the tensors that are not quantized, as stored."""

    @property
    def config(self) -> ModelConfig:
        """What the model computes."""
        return self.plan.config

    @property
    def recipe(self) -> Recipe:
        """How it is quantized."""
        return self.plan.recipe

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of each weight of the decoder's linears, scales and orders counted."""
        return bits_per_weight(self.plan, self.source_dtype)

    @property
    def backend_name(self) -> str:
        """The backends that multiply the decoder's linears; "torch" where they are float."""
        modules = self.model.modules()
        found = [str(m.prepared.backend) for m in modules if isinstance(m, QuantizedLinear)]
        return ", ".join(dict.fromkeys(found)) or "torch"

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


def load_float_layer(
    source: TensorSource, layer: LayerPlan, device: torch.device, dtype: torch.dtype
) -> FloatLayer:
    """Read a layer of a floating-point model, its rows of q and k in rotary order."""
    read = _reader(source, device, dtype)
    sites = {}
    for name, site in layer.sites.items():
        weights = [read(f"{lin.name}.weight", lin.shape) for lin in site.linears]
        biases = [read(f"{lin.name}.bias", lin.shape[:-1]) for lin in site.linears if lin.bias]
        # One tensor is taken as it is: a copy of all experts would double the layer's memory.
        joined = weights[0] if len(weights) == 1 else torch.cat(weights, dim=-2)
        sites[name] = FloatSite(joined, torch.cat(biases, dim=-1) if biases else None)
    layer_weights = FloatLayer(
        norms=_norms(read, layer),
        sites=sites,
        qk_norm=_qk_norm(read, layer),
        sinks=_sinks(source, layer, device),
        router=_router(source, layer, device),
    )
    return in_rotary_order(layer, layer_weights)


def load_quantized_layer(
    source: TensorSource, layer: LayerPlan, device: torch.device, dtype: torch.dtype
) -> LayerWeights:
    """Read a layer of a Quatom checkpoint.

    Raises:
        CheckpointError: the tensors contradict each other.
    """
    read = _reader(source, device, dtype)
    sites = {}
    for name, site in layer.sites.items():
        specs = {n: spec for lin in site.linears for n, spec in linear_tensors(site, lin).items()}
        tensors = {n: source.load(n, spec.shape) for n, spec in specs.items()}
        tensors |= {n: t.to(dtype) for n, t in tensors.items() if n.endswith(".bias")}
        try:
            sites[name] = decode(layer, site, tensors).to(device)
        except CheckpointError as error:
            raise CheckpointError(f"{source.folder}: {error}") from error
    offset = source.load(layer.key_offset_name).to(device) if layer.offsets_keys else None
    return LayerWeights(
        norms=_norms(read, layer),
        sites=sites,
        qk_norm=_qk_norm(read, layer),
        key_offset=offset,
        sinks=_sinks(source, layer, device),
        router=_router(source, layer, device),
    )


def _sinks(source: TensorSource, layer: LayerPlan, device: torch.device) -> Tensor | None:
    """Sinks of attention, in float32 whatever the model's dtype is."""
    shape = (layer.spec.attention.num_heads,)
    sinks = source.load(layer.sinks_name, shape) if layer.spec.attention.sinks else None
    return None if sinks is None else sinks.to(device, torch.float32)


def _router(
    source: TensorSource, layer: LayerPlan, device: torch.device
) -> dict[RouterTensor, Tensor]:
    """What chooses experts, in float32 whatever the model's dtype is."""
    return {
        tensor: source.load(name, shape).to(device=device, dtype=torch.float32)
        for tensor, (name, shape) in layer.router_tensors().items()
    }


def _reader(source: TensorSource, device: torch.device, dtype: torch.dtype) -> Read:
    return lambda name, shape: source.load(name, shape).to(device=device, dtype=dtype)


def rotary_rows(attention: Attention) -> Tensor | None:
    """Row of a model's files at each row of q, k and v in rotary order; None: nothing moves."""
    order = head_order(attention.rope, attention.head_dim)
    if order is None and not attention.rows_by_group:
        return None
    dim, groups = attention.head_dim, attention.num_kv_heads
    order = torch.arange(dim) if order is None else order
    turned = _head_rows(order, attention.num_heads + groups)
    rows = torch.cat((turned, turned.numel() + torch.arange(attention.kv_size)))
    if not attention.rows_by_group:
        return rows
    files = torch.arange(len(rows)).view(groups, -1, dim)  # (KV, H / KV + 2, D)
    parts = files[:, :-2], files[:, -2], files[:, -1]
    return torch.cat([part.flatten() for part in parts])[rows]


def _head_rows(order: Tensor, heads: int) -> Tensor:
    """The order of one head, for all of `heads`."""
    return (torch.arange(heads).unsqueeze(1) * order.numel() + order).flatten()


def in_rotary_order(layer: LayerPlan, weights: FloatLayer) -> FloatLayer:
    """Rows of q and k, in the order of a model's files, moved to rotary order."""
    attention, joined = layer.spec.attention, weights.sites["qkv"]
    rows = rotary_rows(attention)
    if rows is None:
        return weights
    rows = rows.to(joined.weight.device)
    site = FloatSite(joined.weight[rows], None if joined.bias is None else joined.bias[rows])
    norms = weights.qk_norm
    order = head_order(attention.rope, attention.head_dim)
    if norms is not None and order is not None:
        together = attention.qk_norm_axis == "all"
        sizes = (attention.num_heads, attention.num_kv_heads) if together else (1, 1)
        q, k = (_head_rows(order, heads).to(rows.device) for heads in sizes)
        norms = norms[0].index_select(-1, q), norms[1].index_select(-1, k)
    return replace(weights, sites={**weights.sites, "qkv": site}, qk_norm=norms)


def _norms(read: Read, layer: LayerPlan) -> dict[NormName, NormWeights]:
    return {
        name: read_norm(read, norm, layer.norm_name(name), layer.hidden_size)
        for name, norm in layer.spec.norms.items()
    }


def read_norm(read: Read, norm: Norm, prefix: str, size: int) -> NormWeights:
    """Parameters of the norm whose tensors begin with `prefix`."""
    bias = read(f"{prefix}.bias", (size,)) if norm.bias else None
    return NormWeights(read(f"{prefix}.weight", (size,)), bias)


def _qk_norm(read: Read, layer: LayerPlan) -> tuple[Tensor, Tensor] | None:
    """Weights of the norms of q and k as they are stored."""
    attention = layer.spec.attention
    if attention.qk_norm is None:
        return None
    q, k = layer.qk_norm_names
    q_shape, k_shape = qk_norm_shapes(attention)
    return read(f"{q}.weight", q_shape), read(f"{k}.weight", k_shape)


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | Backend | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder, hub id, GGUF or Quatom checkpoint.

    Args:
        source: folder, file or hub id.
        device: where the model runs; None: the GPU if there is one, else the CPU.
        dtype: of activations and of what is not quantized: float32, bfloat16 or float16, as torch's
            dtype or by name; None: float32 on a CPU, otherwise the checkpoint's own.
        backend: implementation of the operations; None picks by device.

    Raises:
        CheckpointError: something is missing, damaged or of a wrong shape.
        ModelError: the architecture or a configuration key is not supported.
        ShapeError: no cache holds heads of that size, so that the model could not run.
        BackendError: the device is not available, or models do not compute in that dtype, or
            there is no such backend.
    """
    device, asked = usable_device(device), usable_dtype(dtype)
    backend = usable_backend(backend)
    opened = open_source(source)
    dtype = asked or default_dtype(opened, device)
    resolved = plan(opened.model_config, opened.recipe or PRESETS["fp16"])
    resolved.check_cache()
    read_layer = load_quantized_layer if resolved.recipe.quantizes_weights else load_float_layer
    blocks = [
        build_block(layer, read_layer(opened, layer, device, dtype), backend)
        for layer in resolved.layers
    ]
    return LoadedModel(
        model=build_decoder(resolved, blocks, _reader(opened, device, dtype), backend),
        plan=resolved,
        tokenizer=find_tokenizer(opened),
        device=device,
        dtype=dtype,
        source=str(source),
        source_dtype=opened.dtype(resolved.config.embedding_name),
    )


def build_decoder(
    resolved: ModelPlan, blocks: list[DecoderBlock], read: Read, backend: Backend | None = None
) -> Decoder:
    """The decoder of these blocks; everything outside of them is read."""
    config = resolved.config
    vocab = (config.vocab_size, config.hidden_size)
    positions = config.positions
    model = Decoder(
        config,
        embedding=read(config.embedding_name, vocab),
        positions=None
        if positions is None
        else read(positions.name, (positions.rows, config.hidden_size)),
        blocks=blocks,
        final_norm=read_norm(read, config.final_norm, config.final_norm_name, config.hidden_size),
        head=None if config.tie_word_embeddings else read(config.head_name, vocab),
        head_bias=read(config.head_bias_name, vocab[:1]) if config.head_bias else None,
        backend=backend,
    )
    return model.eval()
