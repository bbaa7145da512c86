"""What `reorder_quantize` means, in plain torch. The kernels are judged against this file."""

from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows


def reorder_quantize_reference(x: Tensor, order: Tensor | None, spec: QuantizeSpec) -> MixedTensor:
    """See `reorder_quantize`. Runs on any device."""
    reordered = x.float() if order is None else x.float()[:, order.long()]
    return quantize_rows(reordered, spec, x.dtype)
