"""What `silu_quantize` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.numerics.formats import get_format
from quatom.numerics.groups import quantize_groups
from quatom.ops.activations import MixedTensor, QuantizeSpec, pack_values


def silu_quantize_reference(gate_up: Tensor, spec: QuantizeSpec) -> MixedTensor:
    """See `silu_quantize`. Runs on any device."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    values, scales = quantize_groups(
        torch.nn.functional.silu(gate) * up,
        spec.layout,
        get_format(spec.normal),
        get_format(spec.outlier),
        spec.clip_ratio,
    )
    return pack_values(values, scales, spec, gate_up.dtype)
