"""Pages of layers with a sliding window in vLLM 0.26, which counts those of 4 bits as of 8."""

from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import SlidingWindowSpec


def count_window_pages() -> None:
    """Count them as pages of other layers; once per process.

    Later versions of vLLM ask the attention backend for the size (`customize_spec`).
    """
    if hasattr(AttentionBackend, "customize_spec") or hasattr(SlidingWindowSpec, "quatom_before"):
        return
    before = SlidingWindowSpec.real_page_size_bytes.fget

    def size(spec: Any) -> int:
        whole = int(before(spec))
        return whole // 2 if spec.kv_quant_mode.name == "INT4_PER_TOKEN_HEAD" else whole

    SlidingWindowSpec.quatom_before = before
    SlidingWindowSpec.real_page_size_bytes = property(size)
