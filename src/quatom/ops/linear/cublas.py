"""`linear` through cuBLAS, for the two schemes whose inner product is a plain matrix product.

INT8 by INT8 with one scale per token and one per channel (w8a8) is cuBLASLt's INT8 product and one
pass that scales it. INT4 weights under floating-point activations (w4a16) are dequantized to the
activations' dtype first, which rounds each weight once. While few tokens leave the weights the
larger part of the bytes, the Triton kernel multiplies both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor
from quatom.ops.linear.triton import linear_triton
from quatom.ops.linear.triton_product import block_channels

DEQUANTIZE_TOKENS = 256
"""Tokens from which writing out dequantized weights costs less than a slower product."""
INT8_TOKENS = 65
"""Tokens from which cuBLASLt's INT8 product is faster than one tile of the Triton kernel."""
_TILE = 1024


@triton.jit
def _scale_kernel(
    product_ptr,  # (T, N) int32
    xs_ptr,  # (T,) float32
    ws_ptr,  # (N,) float32
    bias_ptr,  # (N,) float32, or ws_ptr where there is none
    y_ptr,  # (T, N)
    N,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = n < N
    product = tl.load(product_ptr + token * N + n, mask=inside, other=0).to(tl.float32)
    y = product * tl.load(xs_ptr + token) * tl.load(ws_ptr + n, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    w_ptr,  # (N, blocks * BK / 2) int8, as `prepare_triton` packs them
    ws_ptr,  # (N, S) float32
    out_ptr,  # (N, K)
    w_row_bytes,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BK: tl.constexpr,
    TILE: tl.constexpr,  # bytes of a program
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * TILE + tl.arange(0, TILE)
    HALF: tl.constexpr = BK // 2
    BLOCKS: tl.constexpr = (GROUP_SIZE + BK - 1) // BK
    block, j = byte // HALF, byte % HALF
    group = block // BLOCKS
    low = group * GROUP_SIZE + (block % BLOCKS) * BK + j
    high = low + HALF
    end = tl.minimum((group + 1) * GROUP_SIZE, K)
    inside = byte < w_row_bytes
    w = tl.load(w_ptr + row * w_row_bytes + byte, mask=inside, other=0)
    scale = tl.load(ws_ptr + row * NUM_SCALES + group, mask=inside, other=0.0)
    out = out_ptr + row * K
    dtype = out_ptr.dtype.element_ty
    low_values = ((w << 4) >> 4).to(tl.float32) * scale
    high_values = (w >> 4).to(tl.float32) * scale
    tl.store(out + low, low_values.to(dtype), mask=inside & (low < end))
    tl.store(out + high, high_values.to(dtype), mask=inside & (high < end))


def dequantize_weights(
    packed: Tensor,  # (N, blocks * BK / 2) uint8
    scales: Tensor,  # (N, S) float32
    layout: GroupLayout,
    dtype: torch.dtype,
) -> Tensor:
    """Weights that `prepare_triton` packed, (N, K) in `dtype`."""
    out = torch.empty((packed.shape[0], layout.channels), dtype=dtype, device=packed.device)
    _dequantize_kernel[(packed.shape[0], triton.cdiv(packed.shape[1], _TILE))](
        packed.view(torch.int8),
        scales,
        out,
        packed.stride(0),
        K=layout.channels,
        GROUP_SIZE=layout.group_size,
        NUM_SCALES=layout.num_scales,
        BK=block_channels(layout),
        TILE=_TILE,
        num_warps=4,
    )
    return out


def linear_cublas(
    x: MixedTensor | Tensor,
    tensors: tuple[Tensor, ...],
    layout: GroupLayout,
    channels: int,
    bias: Tensor | None,
) -> Tensor:
    """See `linear`; reads what `prepare_triton` made. CUDA."""
    weights, _, scales = tensors
    if not isinstance(x, MixedTensor):
        if x.dtype is torch.float32:
            raise BackendError(
                "INT4 weights through cuBLAS take float16 or bfloat16 activations, got float32: "
                "cast them, or use the reference backend"
            )
        if x.shape[0] < DEQUANTIZE_TOKENS:
            return linear_triton(x, tensors, layout, channels, bias)
        real = dequantize_weights(weights, scales, layout, x.dtype)
        return torch.nn.functional.linear(x, real, None if bias is None else bias.to(x.dtype))
    codes, tokens = x.codes, x.tokens
    if tokens < INT8_TOKENS:
        return linear_triton(x, tensors, layout, channels, bias)
    y = torch.empty((tokens, channels), dtype=x.dtype, device=codes.device)
    product = torch._int_mm(codes, weights.t())
    _scale_kernel[(tokens, triton.cdiv(channels, _TILE))](
        product,
        x.scales,
        scales,
        scales if bias is None else bias,
        y,
        channels,
        HAS_BIAS=bias is not None,
        TILE=_TILE,
        num_warps=4,
    )
    return y
