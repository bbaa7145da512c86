"""Which of vLLM's layers runs how, for one checkpoint."""

import re
from typing import Any, Self

import torch
from torch import nn
from vllm import __version__ as vllm_version
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import WeightsMapper

from quatom.checkpoint.reader import read_model_config
from quatom.errors import ModelError
from quatom.integrations.vllm import check_version
from quatom.integrations.vllm.attention import QuatomCacheMethod
from quatom.integrations.vllm.linear import QuatomLinearMethod
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.rotary import head_order
from quatom.plan import LayerPlan, ModelPlan, SitePlan, plan
from quatom.recipe import Recipe

logger = init_logger("vllm.quatom")


class QuatomConfig(QuantizationConfig):
    """Quantization method "quatom": a recipe, and the plan that it makes of a model."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.plan: ModelPlan | None = None
        self.rotary: RotaryTables | None = None
        """Tables for caches that hold K before rotary embedding, once weights are loaded."""
        self._kernels: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read quantization_config of a checkpoint's config.json.

        Raises:
            BackendError: this version of vLLM was not tried.
            RecipeError: the recipe is unknown or newer than this library.
        """
        check_version(vllm_version)
        return cls(Recipe.from_dict(config["recipe"]))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Resolve the recipe for the model; vLLM calls this once it knows the folder.

        Raises:
            ModelError: the model is not supported, or vLLM's model normalizes q and k whose
                channels the checkpoint holds in another order.
            RecipeError: the recipe does not fit the model's sizes.
        """
        config, _recipe = read_model_config(model_name)
        self.plan = plan(config, self.recipe)
        for layer in self.plan.layers:
            attention = layer.spec.attention
            moved = head_order(attention.rope, attention.head_dim) is not None
            if moved and attention.qk_norm is not None:
                raise ModelError(
                    f"{model_name} normalizes q and k whose channels Quatom stores in another "
                    "order than vLLM's model: run it with Quatom's own engine"
                )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How one of vLLM's layers runs; None: as in any unquantized model.

        Raises:
            ModelError: a linear of vLLM's model is none of the checkpoint's.
        """
        if isinstance(layer, Attention):
            quantized = self.recipe.kv_cache.format != "float16"
            return QuatomCacheMethod(self, self.layer_of(prefix)) if quantized else None
        if not isinstance(layer, LinearBase):
            return None
        if not self.recipe.quantizes_weights:
            return UnquantizedLinearMethod()
        found, site = self.site_of(prefix)
        return QuatomLinearMethod(self, found, site)

    def layer_of(self, prefix: str) -> LayerPlan:
        """The layer that a module of this name is in.

        Raises:
            ModelError: there is none.
        """
        for layer in self._plan.layers:
            if prefix.startswith(layer.prefix):
                return layer
        raise ModelError(f"vLLM's model has {prefix}, which is in no layer of the checkpoint")

    def site_of(self, prefix: str) -> tuple[LayerPlan, SitePlan]:
        """The layer and site of a linear that vLLM may have fused of several.

        Raises:
            ModelError: the linears that it is made of are no site of the checkpoint.
        """
        layer = self.layer_of(prefix)
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        wanted = [{f"{parent}.{part}" for part in parts}, {prefix}]
        for site in layer.sites.values():
            if {linear.name for linear in site.linears} in wanted:
                return layer, site
        sites = "; ".join(" ".join(lin.kind for lin in s.linears) for s in layer.sites.values())
        raise ModelError(
            f"vLLM's {prefix} joins {' '.join(parts)}, the checkpoint's linears that share an "
            f"input are: {sites}"
        )

    @property
    def _plan(self) -> ModelPlan:
        if self.plan is None:
            raise ModelError("vLLM did not say which folder the checkpoint is in")
        return self.plan

    @property
    def dummy(self) -> bool:
        """Whether vLLM makes weights up (`--load-format dummy`)."""
        return bool(get_current_vllm_config().load_config.load_format == "dummy")

    def note_kernel(self, backend: str) -> None:
        """Say once which kernels run the recipe."""
        if backend not in self._kernels:
            self._kernels.add(backend)
            logger.info(
                "Quatom: recipe %s, linears on backend %s, KV cache %s",
                self.recipe.name,
                backend,
                self.recipe.kv_cache.format,
            )

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """Where vLLM's attention layer keeps the mean of K."""
        return WeightsMapper(
            orig_to_new_regex={re.compile(r"\.self_attn\.k_offset$"): ".self_attn.attn.k_offset"}
        )

    @classmethod
    def get_name(cls) -> str:
        """Its quant_method in config.json."""
        return "quatom"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations; kernels on a GPU read the 16-bit ones."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the portable kernels: sm_80."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []
