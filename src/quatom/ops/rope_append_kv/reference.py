"""What `rope_append_kv` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.numerics.kv_pages import KVPages


def rotate_halves(
    x: Tensor,  # (T, heads, D)
    cos: Tensor,  # (T, D / 2) float32
    sin: Tensor,  # (T, D / 2) float32
) -> Tensor:
    """Rotary embedding of each token's heads, (T, heads, D) float32."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis, of D = 2**n channels, by H / sqrt(D) in Sylvester order; float32."""
    dim = x.shape[-1]
    x, half = x.float(), 1
    while half < dim:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x * dim**-0.5


def rope_append_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    pages: KVPages,
    rotated: Tensor,
    rotate_keys_in_cache: bool,
    rotate_kv: bool,
    clip_ratio: float,
    key_offset: Tensor | None,
) -> None:
    """See `rope_append_kv`; writes q into `rotated`. Runs on any device."""
    cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
    if rotate_keys_in_cache:
        heads = (q.shape[1], k.shape[1])
        new_q, k = rotate_halves(torch.cat((q, k), dim=1), cos, sin).split(heads, dim=1)
    else:
        new_q = rotate_halves(q, cos, sin)
    if key_offset is not None:
        k = k - key_offset
    if rotate_kv:
        new_q, k = hadamard(new_q), hadamard(k)
    rotated.copy_(new_q)
    pages.append(k, v, slot_mapping, clip_ratio)
