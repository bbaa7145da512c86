"""What `rope_append_kv` means, in plain torch. The kernels are judged against this file."""

import torch
from torch import Tensor

from quatom.numerics.hadamard import rotate_heads
from quatom.numerics.kv_pages import KVPages
from quatom.ops.shared import Shared, geometry, remember, rotary_key


def rotary_factors(
    cos: Tensor,  # (..., D / 2) float32
    sin: Tensor,  # (..., D / 2) float32
) -> tuple[Tensor, Tensor]:
    """What each channel, and the one that it is paired with, is multiplied by: two (..., D)."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_pairs(x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:  # (..., D) float32
    """Rotary embedding by factors that broadcast against x."""
    own, partner = factors
    return (x * own).add_(x.roll(x.shape[-1] // 2, -1).mul_(partner))


def rotate_halves(
    x: Tensor,  # (T, heads, D)
    cos: Tensor,  # (T, D / 2) float32
    sin: Tensor,  # (T, D / 2) float32
) -> Tensor:
    """Rotary embedding of each token's heads, (T, heads, D) float32."""
    return rotate_pairs(x.float(), rotary_factors(cos.unsqueeze(1), sin.unsqueeze(1)))


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
    shared: Shared | None,
) -> None:
    """See `rope_append_kv`; writes q into `rotated`. Runs on any device."""

    def factors() -> tuple[Tensor, Tensor]:
        return rotary_factors(*(t.index_select(0, positions).unsqueeze(1) for t in (cos, sin)))

    rotation = remember(shared, ("rotary factors of new tokens", rotary_key((cos, sin))), factors)
    if rotate_keys_in_cache:
        heads = (q.shape[1], k.shape[1])
        both = torch.cat((q, k), dim=1).float()
        new_q, k = rotate_pairs(both, rotation).split(heads, dim=1)
    else:
        new_q = rotate_pairs(q.float(), rotation)
    if key_offset is not None:
        k = k - key_offset
    if rotate_kv:
        new_q, k = rotate_heads(new_q), rotate_heads(k)
    rotated.copy_(new_q)
    key = ("append plan", geometry(pages))
    plan = remember(shared, key, lambda: pages.plan_append(slot_mapping))
    pages.append_planned(k, v, plan, clip_ratio)
