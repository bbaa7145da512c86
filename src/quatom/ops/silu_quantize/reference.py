"""What `silu_quantize` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.ops.activations import MixedTensor, QuantizeSpec, quantize_rows


def silu_quantize_reference(gate_up: Tensor, spec: QuantizeSpec) -> MixedTensor:
    """See `silu_quantize`. Runs on any device."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize_rows(torch.nn.functional.silu(gate) * up, spec, gate_up.dtype)
