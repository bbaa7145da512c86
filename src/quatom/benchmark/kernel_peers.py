"""The kernels that ours are compared with: what torch brings, and humming if it is installed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quatom.benchmark.timing import copies_to_rotate

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Peer:
    """One kernel on one shape, its weights in as many copies as leave the L2 cache."""

    weight_bytes: int
    input_bytes: int
    """Bytes of an input value."""
    calls: Callable[[int], Calls]
    """Tokens -> one call for each copy of the weights; empty where the kernel cannot run."""


def _copies(weight: Tensor) -> list[Tensor]:
    count = copies_to_rotate(weight.numel() * weight.element_size())
    return [weight, *(weight.clone() for _ in range(count - 1))]


def bf16(channels: int, k: int) -> Peer:
    """Cublas, BF16."""
    weights = _copies(torch.randn(channels, k, device="cuda", dtype=torch.bfloat16))

    def calls(tokens: int) -> Calls:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        return [partial(torch.matmul, x, w.t()) for w in weights]

    return Peer(weights[0].numel() * 2, 2, calls)


def int8(channels: int, k: int) -> Peer:
    """Cublaslt, INT8, no scales at all; needs more than 16 tokens."""
    weight = torch.randint(-127, 128, (channels, k), device="cuda", dtype=torch.int8)
    weights = _copies(weight)

    def calls(tokens: int) -> Calls:
        if tokens <= 16:
            return []
        x = torch.randint(-127, 128, (tokens, k), device="cuda", dtype=torch.int8)
        return [partial(torch._int_mm, x, w.t()) for w in weights]

    return Peer(weight.numel(), 1, calls)


def fp8(channels: int, k: int) -> Peer:
    """Cublaslt, e4m3, one scale a tensor, fast accumulation."""
    weight = torch.randn(channels, k, device="cuda").to(torch.float8_e4m3fn)
    weights = [w.view(torch.float8_e4m3fn) for w in _copies(weight.view(torch.uint8))]
    one = torch.ones((), device="cuda")

    def calls(tokens: int) -> Calls:
        if tokens % 16:
            return []
        x = torch.randn(tokens, k, device="cuda").to(torch.float8_e4m3fn)
        return [
            partial(
                torch._scaled_mm,
                x,
                w.t(),
                one,
                one,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for w in weights
        ]

    return Peer(weight.numel(), 1, calls)


def _humming(activation: str) -> Callable[[int, int], Peer | None]:
    def make(channels: int, k: int) -> Peer | None:
        """INT4 weights in groups of 128, activations in groups of 128: the GEMM alone."""
        try:
            from humming.forward import may_quant_input
            from humming.layer import HummingLayer
        except ImportError:
            return None
        weight = torch.randn(channels, k, device="cuda", dtype=torch.float16)
        bytes_ = channels * k // 2 + channels * (k // 128) * 2
        layers: list[Any] = []
        for _ in range(copies_to_rotate(bytes_)):
            layer = HummingLayer(
                shape_n=channels,
                shape_k=k,
                weight_config={"dtype": "int4", "group_size": 128},
                input_config={"dtype": activation, "group_size": 128},
                torch_dtype=torch.float16,
            ).cuda()
            layer.load_from_unquantized(weight)
            layer.transform()
            layers.append(layer)

        def calls(tokens: int) -> Calls:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            codes, scales = may_quant_input(layers[0].humming_config, x)
            return [partial(layer, codes, input_scale=scales) for layer in layers]

        return Peer(bytes_, 1, calls)

    return make


PEERS: dict[str, Callable[[int, int], Peer | None]] = {
    "bf16": bf16,
    "peer:int8-no-groups": int8,
    "peer:fp8-no-groups": fp8,
    "peer:humming-w4a8-fp8": _humming("float8e4m3"),
    "peer:humming-w4a8-int8": _humming("int8"),
}
"""Scheme -> maker of its calls for a shape (N, K); None where the kernel is not installed."""
