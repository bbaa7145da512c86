"""What `reorder_quantize` means, in plain torch. The kernels are judged against this file."""

from torch import Tensor

from quatom.numerics.formats import get_format
from quatom.numerics.groups import quantize_groups
from quatom.ops.activations import MixedTensor, QuantizeSpec, pack_values


def reorder_quantize_reference(x: Tensor, order: Tensor | None, spec: QuantizeSpec) -> MixedTensor:
    """See `reorder_quantize`. Runs on any device."""
    reordered = x.float() if order is None else x.float()[:, order.long()]
    values, scales = quantize_groups(
        reordered, spec.layout, get_format(spec.normal), get_format(spec.outlier), spec.clip_ratio
    )
    return pack_values(values, scales, spec, x.dtype)
