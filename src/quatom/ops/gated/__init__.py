"""activation(gate) * up, or activation(up), for inputs of down_proj in floating point."""

from typing import get_args

from torch import Tensor

from quatom.errors import ShapeError
from quatom.families.spec import Activation
from quatom.ops.backend import Backend, choose_backend

BACKENDS = (Backend.REFERENCE, Backend.TRITON)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def gated(
    gate_up: Tensor,  # (T, 2 I): I gate channels, then I up channels; (T, I) without gates
    activation: Activation,
    gated: bool,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """activation(gate) * up where `gated`, else activation(up); float32 inside, rounded once.

    silu(x) = x / (1 + exp(-x)), gelu(x) = x (1 + erf(x / sqrt(2))) / 2, relu(x) = max(x, 0),
    relu2(x) = relu(x)**2, and gelu_tanh(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2.
    clamped_swiglu, which needs gates, is (clamp(up, -7, 7) + 1) * g / (1 + exp(-1.702 g)) with
    g = min(gate, 7).

    Args:
        gate_up: float16, bfloat16 or float32.
        activation: one of ACTIVATIONS.
        gated: whether gate_up holds gates before the up channels.
        backend: implementation to run; None picks the fastest one for the device.

    Returns:
        (T, I) in gate_up's dtype.

    Raises:
        ShapeError: gate_up has no even number of channels, or there is no such activation.
    """
    check_activation(activation, gated)
    if gate_up.ndim != 2 or (gated and gate_up.shape[1] % 2):
        raise ShapeError(
            f"expected gate_up (T, {'2 I' if gated else 'I'}), got {tuple(gate_up.shape)}"
        )
    if choose_backend("gated", BACKENDS, gate_up.device, backend) is Backend.TRITON:
        from quatom.ops.gated.triton import gated_triton as run
    else:
        from quatom.ops.gated.reference import gated_reference as run
    return run(gate_up, activation, gated)


def check_activation(activation: str, gated: bool) -> None:
    """Refuse a name that is none of ACTIVATIONS, and one that needs gates where there are none.

    Raises:
        ShapeError: the name and those there are.
    """
    if activation == "clamped_swiglu" and not gated:
        raise ShapeError("activation clamped_swiglu needs gates before the up channels")
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
