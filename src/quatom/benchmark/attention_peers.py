"""What others need for the same attention over contiguous or paged BF16 K and V."""

import importlib.util
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from quatom.benchmark.timing import Timing, copies_to_rotate, time_graph


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def time_decode_peers(
    batch: int, num_heads: int, num_kv_heads: int, length: int, head_dim: int, *, block_size: int
) -> dict[str, Timing]:
    """Decode of one token a sequence: SDPA's cuDNN and FlashAttention, FlashInfer if installed."""
    shape = (2, batch, num_kv_heads, length, head_dim)
    copies = copies_to_rotate(4 * batch * num_kv_heads * length * head_dim)
    caches = [_random(*shape) for _ in range(copies)]
    q = _random(batch, num_heads, 1, head_dim)
    calls = [
        partial(scaled_dot_product_attention, q, cache[0], cache[1], enable_gqa=True)
        for cache in caches
    ]
    times = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):
        with sdpa_kernel(backend):
            times[name] = time_graph(calls)
    del caches, calls
    if importlib.util.find_spec("flashinfer") is not None:
        times["flashinfer"] = _time_flashinfer(q[:, :, 0], num_kv_heads, length, block_size)
    return times


def _time_flashinfer(q: Tensor, num_kv_heads: int, length: int, block_size: int) -> Timing:
    """FlashInfer's decode over BF16 pages, planned once as an engine plans a step."""
    import flashinfer

    batch, num_heads, head_dim = q.shape
    blocks = length // block_size
    cache = _random(batch * blocks, 2, block_size, num_kv_heads, head_dim)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=num_heads > num_kv_heads
    )
    decode.plan(
        torch.arange(0, batch * blocks + 1, blocks, dtype=torch.int32, device="cuda"),
        torch.randperm(batch * blocks, device="cuda").int(),
        torch.full((batch,), block_size, dtype=torch.int32, device="cuda"),
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return time_graph([partial(decode.run, q, cache)])


def time_prefill_peers(
    new_tokens: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> dict[str, Timing]:
    """Causal attention of the last `new_tokens` of `length` tokens by SDPA's two fast backends.

    SDPA gives cuDNN no causal mask that ends at the last token of a longer sequence. Its time is
    that of the same work in two calls, over the cached tokens without a mask and over the new ones
    with one; adding up their results is not counted.
    """
    k, v = _random(2, 1, num_kv_heads, length, head_dim)
    q = _random(1, new_tokens, num_heads, head_dim).transpose(1, 2)
    attend = partial(scaled_dot_product_attention, q, enable_gqa=True)
    whole = partial(attend, k, v, attn_mask=causal_lower_right(new_tokens, length))
    cached = length - new_tokens
    parts = [partial(attend, k[:, :, cached:], v[:, :, cached:], is_causal=True)]
    if cached:
        parts.append(partial(attend, k[:, :, :cached], v[:, :, :cached]))

    def in_parts() -> None:
        for part in parts:
            part()

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        times = {"flash": time_graph([whole], min_calls=2)}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        times["cudnn"] = time_graph([in_parts], min_calls=2)
    return times
