"""CUDA kernel for `gated_quantize`, byte layout `groups`: see quatom/ops/quantize.cu."""

from torch import Tensor

from quatom.families.spec import Activation
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda


def gated_quantize_cuda(
    gate_up: Tensor, spec: QuantizeSpec, activation: Activation, gated: bool
) -> MixedTensor:
    """See `gated_quantize`."""
    return quantize_cuda("gated", gate_up, spec, activation=activation, gated=gated)[0]
