"""silu(gate) * up in front of a down projection: left to the linear after it.

The kernel that quantizes the input of a down projection also computes silu(gate) * up, from what
gate and up made. So the layer between them hands that on as it is. vLLM lets a plugin replace a
layer's class by name; ours is vLLM's own but in models that Quatom quantizes. Other activations
stay vLLM's: it keeps one layer of each for all models of a process.
"""

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul


class DeferredSiluAndMul(SiluAndMul):  # type: ignore[misc]
    """The identity where the linear after it does its work."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        config = get_current_vllm_config_or_none()
        quantization: Any = None if config is None else config.quant_config
        if (
            getattr(quantization, "get_name", lambda: None)() == "quatom"
            and quantization.state.recipe.quantizes_activations
        ):
            self._forward_method = _identity


def replace_activation() -> None:
    """Put it in place of vLLM's, once per process."""
    if SiluAndMul.__name__ not in op_registry_oot:
        SiluAndMul.register_oot(DeferredSiluAndMul)
        DeferredSiluAndMul.name = SiluAndMul.name  # by which options enable it


def _identity(x: Tensor) -> Tensor:  # (T, 2 I), gate and up
    return x
