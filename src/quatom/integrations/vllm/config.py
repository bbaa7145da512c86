"""Which of vLLM's layers runs how, for one checkpoint."""

import re
from typing import Any, Self

import torch
from torch import nn
from vllm import __version__ as vllm_version
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import WeightsMapper

from quatom.integrations.vllm import check_version
from quatom.integrations.vllm.attention import QuatomCacheMethod
from quatom.integrations.vllm.experts import QuatomExpertsMethod
from quatom.integrations.vllm.linear import QuatomLinearMethod
from quatom.integrations.vllm.settings import one_line
from quatom.integrations.vllm.state import EXPERT_MODULES, CheckpointState
from quatom.recipe import Recipe

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What a fused linear joins where vLLM's model does not say: Qwen3-MoE is silent about its dense
layers."""


class QuatomConfig(QuantizationConfig):
    """Quantization method "quatom"."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.state = CheckpointState(recipe)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read quantization_config of a checkpoint's config.json.

        Raises:
            BackendError: this version of vLLM was not tried, or the recipe is unknown or newer than
                this library.
        """
        check_version(vllm_version)
        with one_line():
            return cls(Recipe.from_dict(config["recipe"]))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Resolve the recipe for the model; vLLM calls this once it knows the folder.

        Raises:
            BackendError: what `CheckpointState.resolve` refuses.
        """
        with one_line():
            self.state.resolve(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How one of vLLM's layers runs; None: as in any unquantized model.

        Raises:
            ModelError: a linear of vLLM's model is none of the checkpoint's, or attention has
                another window.
        """
        recipe = self.state.recipe
        if isinstance(layer, Attention):
            self.state.check_window(prefix, layer.sliding_window)
            if recipe.kv_cache.format == "float16":
                return None
            return QuatomCacheMethod(self, self.state, self.state.layer_of(prefix))
        if isinstance(layer, RoutedExperts):
            return QuatomExpertsMethod(layer.moe_config, self.state, self.state.layer_of(prefix))
        if not isinstance(layer, LinearBase):
            return None
        if not recipe.quantizes_weights or self.state.is_router(prefix):
            return UnquantizedLinearMethod()
        name = prefix.rpartition(".")[2]
        parts = (_FUSED | self.packed_modules_mapping).get(name, [name])
        return QuatomLinearMethod(self.state, *self.state.site_of(prefix, parts))

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """Where vLLM's model keeps the mean of K, and experts with their router."""
        names = {re.compile(r"\.self_attn\.k_offset$"): ".self_attn.attn.k_offset"}
        module = EXPERT_MODULES.get(self.state.plan.config.family, "mlp")
        if module != "mlp":
            names[re.compile(r"\.mlp\.(experts|gate)\.")] = rf".{module}.\1."
        return WeightsMapper(orig_to_new_regex=names)

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
