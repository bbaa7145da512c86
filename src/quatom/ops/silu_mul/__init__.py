"""SiLU(gate) * up, for inputs of down_proj that stay in floating point."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.backend import Backend, choose_backend

BACKENDS = (Backend.REFERENCE, Backend.TRITON)


def silu_mul(
    gate_up: Tensor,  # (T, 2 I) float16, bfloat16 or float32: I gate channels, then I up channels
    *,
    backend: Backend | None = None,
) -> Tensor:
    """silu(gate) * up, with silu rounded to gate_up's dtype before the product.

    Args:
        backend: implementation to run; None picks the fastest one for the device.

    Returns:
        (T, I) in gate_up's dtype.

    Raises:
        ShapeError: gate_up has no even number of channels.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ShapeError(f"expected gate_up (T, 2 I), got {tuple(gate_up.shape)}")
    if choose_backend("silu_mul", BACKENDS, gate_up.device, backend) is Backend.TRITON:
        from quatom.ops.silu_mul.triton import silu_mul_triton as run
    else:
        from quatom.ops.silu_mul.reference import silu_mul_reference as run
    return run(gate_up)
