"""Plugin of vLLM: `vllm serve CHECKPOINT` runs Quatom checkpoints with vLLM's own models.

vLLM calls `register` in every process (entry point group `vllm.general_plugins`). What follows
from a checkpoint's recipe is in the modules beside this one:

    shares      what one tensor-parallel rank holds of a layer: slices of what is stored
    linear      the linear method: loads the slices, quantizes the input, multiplies
    operator    the torch operator that does both, with a fake implementation for torch.compile
    experts     the same for routed experts, and expert_operator
    dummy       weights where vLLM was asked for none
    activation  leaves silu(gate) * up to the linear after it
    attention   the attention backend over 4-bit and 8-bit KV pages
    window_pages  the size of pages of layers with a window, in vLLM 0.26
    state       what a process knows about its checkpoint
    config      which of vLLM's layers gets which of these
    settings    what the recipe asks of vLLM's own settings, before anything starts
"""

TRIED = ("0.26.0", "0.32.0")
"""Versions of vLLM that the tests or the measurements in the docs ran with."""


def register() -> None:
    """Make the quantization method "quatom" known to vLLM; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from quatom.integrations.vllm.activation import replace_activation
    from quatom.integrations.vllm.config import QuatomConfig
    from quatom.integrations.vllm.settings import hook_architectures, route_cpu_attention
    from quatom.integrations.vllm.window_pages import count_window_pages

    register_quantization_config("quatom")(QuatomConfig)
    backend = "quatom.integrations.vllm.attention.QuatomAttentionBackend"
    register_backend(AttentionBackendEnum.CUSTOM, backend)
    replace_activation()
    route_cpu_attention()
    count_window_pages()
    hook_architectures()


def check_version(version: str) -> None:
    """Refuse versions of vLLM that nobody tried.

    Raises:
        BackendError: `version` is none of `TRIED`.
    """
    from quatom.errors import BackendError

    release = version.partition("+")[0]
    if release not in TRIED:
        raise BackendError(
            f"Quatom's plugin was tried with vLLM {' and '.join(TRIED)}, this is {version}: "
            "install one of those"
        )
