"""Triton kernel for `gated`: a program takes a run of channels of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.families.spec import Activation
from quatom.ops.triton_activations import KINDS, activate, lift

_TILE = 1024
"""Channels of a program: several programs for a single token."""


@triton.jit
def _gated_kernel(
    gate_up_ptr,  # (T, 2 I), or (T, I) unless GATED
    out_ptr,  # (T, I)
    row_stride,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # T * 2 I overflows int32 on long prefills
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = channel < CHANNELS
    at = gate_up_ptr + token * row_stride + channel
    x = activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        x *= lift(tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    out = out_ptr + token * CHANNELS + channel
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside)


def gated_triton(gate_up: Tensor, activation: Activation, gated: bool) -> Tensor:
    """See `gated`. CUDA, or the CPU under TRITON_INTERPRET=1."""
    tokens, channels = gate_up.shape[0], gate_up.shape[1] // (2 if gated else 1)
    out = torch.empty((tokens, channels), dtype=gate_up.dtype, device=gate_up.device)
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    if tokens:
        _gated_kernel[(tokens, triton.cdiv(channels, _TILE))](
            gate_up,
            out,
            gate_up.stride(0),
            CHANNELS=channels,
            ACTIVATION=KINDS[activation],
            GATED=gated,
            TILE=_TILE,
            num_warps=4,
        )
    return out
