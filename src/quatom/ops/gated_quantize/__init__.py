"""activation(gate) * up -> dynamic mixed-precision quantization (before down_proj)."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.families.spec import Activation
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_quantize import can_quantize
from quatom.ops.gated import check_activation
from quatom.ops.gated_quantize.reference import gated_quantize_reference

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)


def gated_quantize(
    gate_up: Tensor,  # (T, 2 I): I gate channels, then I up channels; (T, I) without gates
    spec: QuantizeSpec,
    activation: Activation,
    gated: bool,
    *,
    backend: Backend | None = None,
) -> MixedTensor:
    """Quantize activation(gate) * up, or activation(up), group by group.

    There is no reorder: down_proj's channel order is folded into the rows of gate and up when the
    checkpoint is made, so that channels arrive in reordered position. The product is float32 and
    is quantized without an intermediate rounding; exp, erf and tanh differ by ulps between
    backends, hence codes by one step on few elements.

    Args:
        gate_up: float16, bfloat16 or float32.
        spec: groups, formats and clip ratio; its layout has I channels.
        activation: as in `quatom.ops.gated`.
        gated: whether gate_up holds gates before the up channels.
        backend: implementation to run; None picks the fastest one for the device.

    Raises:
        ShapeError: gate_up does not have the layout's channels, or there is no such activation.
        BackendError: the backend does not exist or has no kernel for the formats.

    Source: Atom (Zhao et al., MLSys 2024).
    """
    check_activation(activation, gated)
    channels = spec.layout.channels
    expected = 2 * channels if gated else channels
    if gate_up.ndim != 2 or gate_up.shape[1] != expected:
        raise ShapeError(
            f"expected gate_up (T, {expected}), {'twice ' if gated else ''}the layout's {channels} "
            f"channels; got {tuple(gate_up.shape)}"
        )
    able = BACKENDS if can_quantize(gate_up, spec) else BACKENDS[:2]
    available = BACKENDS if backend else able  # a backend asked for says itself what it lacks
    match choose_backend("gated_quantize", available, gate_up.device, backend):
        case Backend.CUDA:
            from quatom.ops.gated_quantize.cuda import gated_quantize_cuda as run
        case Backend.TRITON:
            from quatom.ops.gated_quantize.triton import gated_quantize_triton as run
        case _:
            run = gated_quantize_reference
    return run(gate_up, spec, activation, gated)
