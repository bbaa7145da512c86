"""What `gated_quantize` means, in plain torch. The kernels are judged against this file."""

from torch import Tensor

from quatom.families.spec import Activation
from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows
from quatom.ops.gated.reference import activate


def gated_quantize_reference(
    gate_up: Tensor, spec: QuantizeSpec, activation: Activation, gated: bool
) -> MixedTensor:
    """See `gated_quantize`. Runs on any device."""
    return quantize_rows(activate(gate_up, activation, gated), spec, gate_up.dtype)
