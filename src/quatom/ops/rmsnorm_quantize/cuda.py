"""CUDA kernel for `rmsnorm_quantize`, byte layout `groups`: see quatom/ops/quantize.cu."""

from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda


def rmsnorm_quantize_cuda(
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    eps: float,
    residual: Tensor | None,
) -> tuple[MixedTensor, Tensor]:
    """See `rmsnorm_quantize`."""
    return quantize_cuda("rmsnorm", x, spec, order=order, weight=weight, residual=residual, eps=eps)
