"""What a checkpoint's recipe asks of vLLM's settings, before any process starts.

vLLM lets each architecture adjust its configuration (`VerifyAndUpdateConfig`). Ours does that for
every architecture that Quatom knows, where the checkpoint is Quatom's, after vLLM's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quatom.checkpoint.reader import read_model_config
from quatom.errors import BackendError, ModelError, RecipeError
from quatom.families.registry import FAMILIES
from quatom.families.spec import ModelConfig
from quatom.integrations.vllm.shares import check_degree
from quatom.recipe import Recipe

CACHE_DTYPES = {"int4": "int4_per_token_head", "int8": "int8_per_token_head"}
"""vLLM's names of caches whose pages have the size of ours, by our format."""


def update_settings(vllm_config: Any) -> None:
    """Set the KV cache's format and attention backend; refuse what the checkpoint cannot run on.

    Raises:
        RecipeError: the tensor-parallel degree does not divide the recipe's, or layers differ in
            what vLLM has one of.
        ModelError: routed experts would be spread over ranks, or computed in float16 by a model
            of vLLM that is wrong then.
        BackendError: another KV cache or attention backend was asked for than the recipe's.
    """
    quantization = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "quatom":
        return
    recipe = Recipe.from_dict(quantization["recipe"])
    config, _recipe = read_model_config(vllm_config.model_config.model)
    _check_experts(vllm_config, config)
    _tell_growth(vllm_config.model_config.hf_config, config)
    check_degree(recipe, vllm_config.parallel_config.tensor_parallel_size)
    _check_overrides(recipe)
    cache = recipe.kv_cache.format
    if cache == "float16":
        return
    dtype, asked = CACHE_DTYPES[cache], vllm_config.cache_config.cache_dtype
    if asked not in ("auto", dtype):
        raise BackendError(
            f"recipe {recipe.name} has an {cache} KV cache, kv_cache_dtype {asked} was asked for: "
            "leave it at auto"
        )
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        raise RecipeError(
            f"recipe {recipe.name} has an {cache} KV cache in every layer: leave "
            "kv_cache_dtype_skip_layers empty"
        )
    vllm_config.cache_config.cache_dtype = dtype
    _choose_backend(vllm_config.attention_config, cache)


def _check_overrides(recipe: Recipe) -> None:
    """Refuse what vLLM has one of for all layers."""
    caches = recipe.kv_formats
    inputs = dict.fromkeys(own.activations.format for own in recipe.variants)
    found = f"KV caches of formats {', '.join(caches)}" if len(caches) > 1 else ""
    if len(inputs) > 1 and "float16" in inputs:  # SiluAndMul leaves its work to the linear, or not
        found = f"activations of formats {', '.join(inputs)}"
    if found:
        raise RecipeError(
            f"recipe {recipe.name} has {found}, and vLLM's model has one cache, and quantized or "
            "floating-point inputs, in all layers: use quatom serve, or quantize without these "
            "overrides"
        )


def _tell_growth(hf_config: Any, config: ModelConfig) -> None:
    """Write how queries grow where vLLM's Mistral looks for it: a key of Mistral's own files."""
    for layer in config.layers:
        if (growth := layer.attention.query_growth) is not None:
            scaling = {"beta": growth.beta, "original_max_position_embeddings": growth.length}
            hf_config.llama_4_scaling = scaling


def _check_experts(vllm_config: Any, config: ModelConfig) -> None:
    """Refuse what routed experts do not run with.

    Ranks that would share those of a layer: each lies on one rank whole. And float16 where they
    have a factor: vLLM divides all else by it then, which its model of GLM-4.5 does not make up
    for.
    """
    parallel, folder = vllm_config.parallel_config, vllm_config.model_config.model
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    if ranks > 1 and any(layer.experts is not None for layer in config.layers):
        raise ModelError(
            f"{folder} has routed experts, which are not cut or spread over ranks: "
            f"tensor_parallel_size {parallel.tensor_parallel_size} and data_parallel_size "
            f"{parallel.data_parallel_size} were asked for; use 1 of each, and "
            "pipeline_parallel_size for more GPUs"
        )
    factors = {layer.experts.router.scale for layer in config.layers if layer.experts is not None}
    if factors - {1.0} and vllm_config.model_config.dtype is torch.float16:
        raise ModelError(
            f"{folder} multiplies what routed experts compute by {max(factors):g}, which vLLM's "
            "model gets wrong in float16: use dtype bfloat16"
        )


@contextmanager
def one_line() -> Iterator[None]:
    """Keep a refusal as it is: pydantic, which calls us, wraps a ValueError in a page of its own.

    Raises:
        BackendError: in place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise BackendError(str(error)) from error


def _choose_backend(attention_config: Any, cache: str) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        return  # see `route_cpu_attention`
    ours = AttentionBackendEnum.CUSTOM
    if attention_config.backend not in (None, ours):
        raise BackendError(
            f"attention backend {attention_config.backend.name} does not read Quatom's {cache} "
            "pages: leave attention_config.backend unset"
        )
    attention_config.backend = ours


def hook_architectures() -> None:
    """Let every architecture of `quatom.families` call `update_settings`; once per process.

    And those that vLLM takes for architectures it does not know.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    known = [name for family in FAMILIES for name in family.architectures]
    for architecture in (*known, "TransformersForCausalLM", "TransformersMoEForCausalLM"):
        before = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not getattr(before, "quatom", False):
            MODELS_CONFIG_MAP[architecture] = _after(before)


def _after(before: Any) -> type:
    class Update(before):  # type: ignore[misc]
        """vLLM's own adjustments, then ours."""

        quatom = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            before.verify_and_update_config(vllm_config)
            with one_line():
                update_settings(vllm_config)

    return Update


def route_cpu_attention() -> None:
    """On a CPU, where vLLM takes its one backend, send our KV cache formats to ours."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or hasattr(platform, "quatom_before"):
        return
    before = platform.get_attn_backend_cls

    def choose(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *rest: Any, **options: Any
    ) -> str:
        if attn_selector_config.kv_cache_dtype in CACHE_DTYPES.values():
            return "quatom.integrations.vllm.attention.QuatomCPUAttentionBackend"
        return str(before(selected_backend, attn_selector_config, *rest, **options))

    platform.quatom_before = before
    platform.get_attn_backend_cls = classmethod(choose)
