"""What `reorder_quantize` means, in plain torch. The kernels are judged against this file."""

from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows


def reorder_quantize_reference(x: Tensor, order: Tensor | None, spec: QuantizeSpec) -> MixedTensor:
    """See `reorder_quantize`. Runs on any device."""
    return quantize_rows(x, spec, x.dtype, order)
