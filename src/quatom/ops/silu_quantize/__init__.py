"""SiLU(gate) * up -> dynamic mixed-precision quantization (before down_proj)."""

from torch import Tensor

from quatom.errors import ShapeError
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend, choose_backend
from quatom.ops.cuda_quantize import can_quantize
from quatom.ops.silu_quantize.reference import silu_quantize_reference

BACKENDS = (Backend.REFERENCE, Backend.TRITON, Backend.CUDA)


def silu_quantize(
    gate_up: Tensor,  # (T, 2 I) float16, bfloat16 or float32: I gate channels, then I up channels
    spec: QuantizeSpec,
    *,
    backend: Backend | None = None,
) -> MixedTensor:
    """Quantize silu(gate) * up group by group.

    There is no reorder: down_proj's channel order is folded into the rows of gate and up when the
    checkpoint is made, so that channels arrive in reordered position. The product is float32 and
    is quantized without an intermediate rounding; exp differs by an ulp between backends, hence
    codes by one step on few elements.

    Args:
        spec: groups, formats and clip ratio; its layout has I channels.
        backend: implementation to run; None picks the fastest one for the device.

    Raises:
        ShapeError: gate_up is not (T, 2 I).
        BackendError: the backend does not exist or has no kernel for the formats.

    Source: Atom (Zhao et al., MLSys 2024).
    """
    channels = spec.layout.channels
    if gate_up.ndim != 2 or gate_up.shape[1] != 2 * channels:
        raise ShapeError(
            f"expected gate_up (T, {2 * channels}), twice the layout's {channels} channels; got "
            f"{tuple(gate_up.shape)}"
        )
    able = BACKENDS if can_quantize(gate_up, spec) else BACKENDS[:2]
    available = BACKENDS if backend else able  # a backend asked for says itself what it lacks
    match choose_backend("silu_quantize", available, gate_up.device, backend):
        case Backend.CUDA:
            from quatom.ops.silu_quantize.cuda import silu_quantize_cuda as run
        case Backend.TRITON:
            from quatom.ops.silu_quantize.triton import silu_quantize_triton as run
        case _:
            run = silu_quantize_reference
    return run(gate_up, spec)
