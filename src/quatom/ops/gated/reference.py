"""What `gated` means, in plain torch."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from quatom.families.spec import Activation

CLAMP, ALPHA = 7.0, 1.702
"""Of clamped_swiglu."""
_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "clamped_swiglu": lambda gate: (g := gate.clamp(max=CLAMP)) * (ALPHA * g).sigmoid(),
    "relu2": lambda x: functional.relu(x).square(),
}


def activate(gate_up: Tensor, activation: Activation, gated: bool) -> Tensor:
    """The inputs of down_proj, (T, I) float32."""
    function = _FUNCTIONS[activation]
    if not gated:
        return function(gate_up.float())
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        up = up.clamp(-CLAMP, CLAMP) + 1.0
    return function(gate) * up


def gated_reference(gate_up: Tensor, activation: Activation, gated: bool) -> Tensor:
    """See `gated`. Runs on any device."""
    return activate(gate_up, activation, gated).to(gate_up.dtype)
