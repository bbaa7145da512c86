"""CUDA kernel for `silu_quantize`, byte layout `groups`: see quatom/ops/quantize.cu."""

from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda


def silu_quantize_cuda(gate_up: Tensor, spec: QuantizeSpec) -> MixedTensor:
    """See `silu_quantize`."""
    return quantize_cuda("silu", gate_up, spec)[0]
