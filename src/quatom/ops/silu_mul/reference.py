"""What `silu_mul` means, in plain torch."""

from torch import Tensor
from torch.nn import functional


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """See `silu_mul`. Runs on any device."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
