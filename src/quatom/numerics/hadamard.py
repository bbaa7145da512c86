"""Hadamard rotations: orthogonal, made of equal magnitudes, and their own inverse.

Multiplying a row by a Hadamard matrix spreads each value over all others, so that a group has no
outlier of its own left and a smaller step covers it. Activations and weights are rotated alike and
their dot product stays the same.

Source: QuaRot (Ashkboos et al., NeurIPS 2024) for rotations that leave a network's function
unchanged; here each normal group of Atom's layout is rotated within itself, outliers stay apart.
"""

from functools import cache

import torch
from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout


@cache
def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The symmetric orthonormal Hadamard matrix of a power of two, (size, size) float32.

    Raises:
        ShapeError: size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ShapeError(f"a Hadamard matrix needs a power of two, got {size}")
    return _sylvester(size).to(device)


def hadamard_block(size: int) -> int:
    """Channels that a rotation of `size` channels mixes: the largest power of two in it.

    Groups, heads of q and k and heads of v alike: sizes that are no power of two are rotated by a
    block-diagonal matrix.
    """
    return size & -size


def common_block(layout: GroupLayout) -> int:
    """Channels that a rotation of any normal group mixes, or 0 where a last group is shorter."""
    whole = layout.normal % layout.group_size == 0
    return hadamard_block(layout.group_size) if whole else 0


def rotate_last_axis(x: Tensor, block: int) -> Tensor:
    """Multiply every `block` consecutive values of the last axis by a Hadamard matrix; float32."""
    blocks = x.float().unflatten(-1, (-1, block))
    return (blocks @ hadamard(block, x.device)).flatten(-2)


def rotate_heads(x: Tensor) -> Tensor:
    """Rotate each head of q or k, (..., D) of even D; float32.

    A block is as many neighbouring channels of the first half of the head and their partners, D / 2
    further, so that kernels, which hold a head as two halves, never move a channel from one to the
    other. Where D is a power of two this is the Hadamard matrix of D.
    """
    block, bit = hadamard_block(x.shape[-1]), 1
    x = x.float()
    while 2 * bit < block:
        a, b = x.unflatten(-1, (-1, 2, bit)).unbind(dim=-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        bit *= 2
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low + high, low - high), dim=-1) * block**-0.5


def rotate_groups(
    x: Tensor,  # (..., K) channels in reordered position
    layout: GroupLayout,
) -> Tensor:
    """Rotate each normal group within itself, (..., K) float32; outliers stay as they are."""
    full = layout.normal // layout.group_size * layout.group_size
    sizes = (full, layout.normal - full, layout.outliers)
    whole, short, outliers = x.float().split(sizes, dim=-1)
    parts = [rotate_last_axis(whole, hadamard_block(layout.group_size))] if full else []
    if short.shape[-1]:
        parts.append(rotate_last_axis(short, hadamard_block(short.shape[-1])))
    return torch.cat((*parts, outliers), dim=-1)
