"""CUDA kernel for `norm_quantize`, byte layout `groups`: see quatom/ops/quantize.cu."""

from torch import Tensor

from quatom.families.spec import Norm
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda
from quatom.ops.experts.groups import ExpertSum


def norm_quantize_cuda(
    x: Tensor | ExpertSum,
    weight: Tensor,
    order: Tensor | None,
    spec: QuantizeSpec,
    norm: Norm,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[MixedTensor, Tensor]:
    """See `norm_quantize`."""
    sums = None
    if isinstance(x, ExpertSum):
        sums = x.groups.positions, x.weights
        x = x.y
    return quantize_cuda(
        "norm",
        x,
        spec,
        order=order,
        weight=weight,
        norm=norm,
        bias=bias,
        residual=residual,
        sums=sums,
    )
