"""Quatom checkpoints in transformers. Importing this module is what makes them known.

    import quatom.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("CHECKPOINT")

The model is transformers' own, with our linears. It computes what `quatom.LLM` computes; speed and
memory are the engine's business, not this module's: every linear quantizes its own input, and
transformers' cache keeps K and V in floating point, each read as the value that a Quatom cache
would give back.

Without the import from_pretrained stops: config.json names an attention implementation, "quatom",
that transformers does not have.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quatom.checkpoint.codec import decode
from quatom.checkpoint.reader import read_model_config
from quatom.checkpoint.schema import linear_tensors
from quatom.errors import CheckpointError, ModelError
from quatom.families.spec import Attention
from quatom.loading import rotary_rows
from quatom.modeling.build import build_site
from quatom.modeling.inputs import InputQuantizer
from quatom.modeling.linear import SiteLinear
from quatom.modeling.rotated import RotatedLinear
from quatom.numerics.hadamard import rotate_heads
from quatom.numerics.kv_codes import asymmetric_codes, asymmetric_range
from quatom.numerics.reorder import inverse_order
from quatom.numerics.rotary import head_order
from quatom.plan import LayerPlan, LinearPlan, SitePlan, plan
from quatom.recipe import KVSpec, Recipe

METHOD = "quatom"
"""quant_method and attn_implementation in a checkpoint's config.json."""
_OWN_ATTENTION = ("falcon", "gpt_neo", "gptj")
"""Model types whose code, in some release of transformers, knows its own attention alone."""
_ONE = "devices, and a Quatom model in transformers runs on one: name it, or use vLLM"


class QuatomQuantizationConfig(QuantizationConfigMixin):
    """quantization_config of a checkpoint: the recipe."""

    def __init__(
        self,
        recipe: dict[str, Any],
        modules_to_not_convert: list[str] | None = None,
        **_: Any,  # quant_method
    ) -> None:
        self.quant_method: Any = METHOD
        self.recipe = recipe
        self.modules_to_not_convert = modules_to_not_convert


class QuatomQuantizer(HfQuantizer):
    """Puts our linears into transformers' model before it loads weights."""

    requires_calibration = True

    def update_device_map(self, device_map: Any) -> Any:
        """One device for the whole model; "auto" and its like mean the first GPU, else the CPU.

        Raises:
            ModelError: the map names several devices, or the disk.
        """
        if device_map is None:
            return None
        if isinstance(device_map, str):  # transformers has made a map of the name of a device
            gpus = torch.cuda.device_count()
            if device_map != "auto" and gpus > 1:
                raise ModelError(f"device_map {device_map!r} spreads a model over {gpus} {_ONE}")
            return {"": "cuda:0" if gpus else "cpu"}
        devices = sorted({str(device) for device in device_map.values()})
        if len(devices) > 1 or "disk" in devices:
            raise ModelError(f"device_map names {', '.join(devices)} {_ONE}")
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers builds the model: its code must take our attention.

        Raises:
            ModelError: it does not.
        """
        if config.model_type in _OWN_ATTENTION:
            raise ModelError(
                f"transformers' model of {config.model_type} does not take Quatom's attention: use "
                "quatom.load"
            )
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The hook before the build of versions that lack `update_attn_implementation`."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a Quatom checkpoint is loaded from its files alone")
        config, _recipe = read_model_config(Path(checkpoint_files[0]).parent)
        stored: Any = self.quantization_config
        recipe = Recipe.from_dict(stored.recipe)
        asked = model.config._attn_implementation
        caches = [name for name in recipe.kv_formats if name != "float16"]
        if caches and asked != METHOD:
            if asked not in (None, "sdpa"):
                raise ModelError(
                    f"recipe {recipe.name} has an {' and '.join(caches)} KV cache, which "
                    f"attn_implementation {asked!r} does not know: leave it out"
                )
            model.set_attn_implementation(METHOD)
        model.config.attn_implementation = METHOD  # `save_pretrained` writes it again
        for layer in plan(config, recipe).layers:
            _convert_layer(model, layer, recipe)

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    def is_serializable(self) -> bool:
        """What is saved is what was loaded."""
        return True


def _convert_layer(model: Any, layer: LayerPlan, recipe: Recipe) -> None:
    spec = layer.spec.attention
    if layer.spec.experts is not None and recipe.quantizes_weights:
        raise ModelError(f"{layer.prefix[:-1]} has routed experts: use quatom.load")
    if any(norm.implicit for norm in layer.spec.norms.values()):
        raise ModelError(
            f"{layer.prefix[:-1]} has norms to which transformers' model gives no weights, and "
            "Quatom scales channels by them: use quatom.load"
        )
    if spec.sinks:
        raise ModelError(f"{layer.prefix[:-1]} has attention with sinks: use quatom.load")
    if spec.qk_norm is not None and spec.qk_norm_axis == "each":
        raise ModelError(
            f"{layer.prefix[:-1]} has a norm for each head of q and k, which Quatom stores in "
            "another form than transformers' model: use quatom.load"
        )
    if head_order(spec.rope, spec.head_dim) is not None and spec.qk_norm is not None:
        raise ModelError(
            f"{layer.prefix[:-1]} normalizes q and k whose channels Quatom stores in another "
            "order: use quatom.load"
        )
    try:
        attention = model.get_submodule(f"{layer.prefix}self_attn")
    except AttributeError as error:
        raise ModelError(
            f"{layer.prefix[:-1]} has other names in transformers' model than in the checkpoint: "
            "use quatom.load"
        ) from error
    attention.quatom_attention, attention.quatom_cache = spec, layer.kv_cache
    attention.k_offset = None
    if layer.offsets_keys:
        shape = spec.num_kv_heads, spec.head_dim
        attention.k_offset = nn.Parameter(torch.empty(shape, dtype=torch.float32), False)
    if recipe.quantizes_weights:
        for site in layer.sites.values():
            for stored in site.linears:
                model.set_submodule(stored.name, QuatomLinear(layer, site, stored))
    cache = layer.kv_cache
    if cache.format != "float16" and not cache.post_rope:
        _quantize_unturned_keys(model, layer)


def _quantize_unturned_keys(model: nn.Module, layer: LayerPlan) -> None:
    """K is cached before rotary embedding: what makes it returns what a cache would give back."""
    spec, cache = layer.spec.attention, layer.kv_cache
    keys = slice(spec.q_size, spec.q_size + spec.kv_size)  # in the joined output of q, k and v
    for stored in layer.sites["qkv"].linears:
        if stored.first <= keys.start < stored.first + stored.rows:
            maker, own = stored.name, slice(keys.start - stored.first, keys.stop - stored.first)
    if spec.qk_norm is not None:
        maker, own = layer.qk_norm_names[1], slice(None)

    def hook(_module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        made = y[..., own]
        heads = made.reshape(*made.shape[:-1], -1, spec.head_dim) if own.stop else made
        y = y.clone()
        y[..., own] = cached_values(heads, cache).reshape(made.shape).to(y.dtype)
        return y

    model.get_submodule(maker).register_forward_hook(hook)


class QuatomLinear(nn.Module):
    """One linear as stored; repacked for the device that it first runs on."""

    def __init__(self, layer: LayerPlan, site: SitePlan, stored: LinearPlan) -> None:
        super().__init__()
        self.stored = stored
        own = replace(site, linears=(replace(stored, first=0),))
        self.layer, self.site = replace(layer, sites={**layer.sites, site.name: own}), own
        for name, spec in linear_tensors(own, stored).items():
            dtype = spec.dtype or torch.get_default_dtype()
            tensor = nn.Parameter(torch.empty(spec.shape, dtype=dtype), requires_grad=False)
            self.register_parameter(name.removeprefix(f"{stored.name}."), tensor)
        # In a tuple: a module of a module would be found by its name, and saved.
        self._built: tuple[SiteLinear | RotatedLinear, InputQuantizer] | None = None
        self._built_on: torch.device | None = None
        self._rows: Tensor | None = None

    @torch.no_grad()
    def _build(self) -> tuple[SiteLinear | RotatedLinear, InputQuantizer]:
        site, tensors = self.site, {}
        for name, parameter in self.named_parameters():
            tensors[f"{self.stored.name}.{name}"] = parameter.detach().cpu()
        device = next(self.parameters()).device
        # transformers turns q and k in the order of their files.
        rows = rotary_rows(self.layer.spec.attention) if site.name == "qkv" else None
        if rows is not None:
            own = rows[self.stored.row_range] - self.stored.first
            self._rows = inverse_order(own).to(device)
        codes = decode(self.layer, site, tensors).to(device)
        return build_site(site, codes)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., K), bias added: (..., N)."""
        if self._built is None or self._built_on != x.device:
            self._built, self._built_on = self._build(), x.device
        linear, inputs = self._built
        y: Tensor = linear(inputs.plain(x.reshape(-1, x.shape[-1])))
        if self._rows is not None:
            y = y[:, self._rows]
        return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def cached_values(x: Tensor, cache: KVSpec) -> Tensor:  # (..., D)
    """What a Quatom cache gives back for rows of K or V, float32."""
    scale, minimum = asymmetric_range(x, cache.bits, cache.clip_ratio)
    codes = asymmetric_codes(x, scale, minimum, cache.bits)
    return codes.float().mul_(scale).add_(minimum)


def quatom_attention(
    module: Any,
    query: Tensor,  # (B, H, T, D), turned
    key: Tensor,  # (B, KV, S, D), turned
    value: Tensor,  # (B, KV, S, D)
    attention_mask: Tensor | None,  # (B, 1, T, S) bool; None: causal
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over the values that a Quatom cache would give back: (B, T, H, D)."""
    spec: Attention = module.quatom_attention
    cache: KVSpec = module.quatom_cache
    if cache.format != "float16":
        dtype = query.dtype
        value = cached_values(value, cache).to(dtype)
        if cache.post_rope:
            order = head_order(spec.rope, spec.head_dim)
            if order is not None:
                query, key = query[..., order], key[..., order]
            key = key.float()
            if module.k_offset is not None:
                key = key - module.k_offset.unsqueeze(1)
            if cache.rotates_keys:
                query, key = rotate_heads(query).to(dtype), rotate_heads(key)
            key = cached_values(key, cache).to(dtype)
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scores = query @ key.transpose(2, 3) * options["scaling"]
    scores = torch.tanh(scores.float() / softcap) * softcap
    if attention_mask is None:
        shape = scores.shape[-2:]
        allowed = torch.ones(shape, dtype=torch.bool, device=scores.device)
        attention_mask = allowed.tril(shape[1] - shape[0])
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the module may be loaded again
    register_quantization_config(METHOD)(QuatomQuantizationConfig)
    register_quantizer(METHOD)(QuatomQuantizer)
    AttentionInterface.register(METHOD, quatom_attention)
    AttentionMaskInterface.register(METHOD, sdpa_mask)
