"""CUDA kernel for `reorder_quantize`, byte layout `groups`: see quatom/ops/quantize.cu."""

from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda


def reorder_quantize_cuda(x: Tensor, order: Tensor | None, spec: QuantizeSpec) -> MixedTensor:
    """See `reorder_quantize`."""
    return quantize_cuda("reorder", x, spec, order=order)[0]
