"""Random orthogonal matrices that spread every weight and every input value over all others.

A matrix of n channels is a Kronecker product of small symmetric ones after random signs: Hadamard
matrices for the powers of two in n, and for the odd part of n a Hartley matrix, whose entries are
(cos a + sin a) / sqrt(p). No entry is larger than sqrt(2 / n), so that a weight rotated on both
sides has no outliers, whatever it was before. The cost per row is n times the sum of the factors.

Source: QuIP (Chee et al., NeurIPS 2023) for two-sided incoherence processing and Kronecker
products; QuIP# (Tseng et al., ICML 2024) for Hadamard matrices with random signs.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from math import pi

import torch
from torch import Tensor

from quatom.numerics.hadamard import hadamard

_LARGEST_HADAMARD = 128
"""A larger power of two is a product of several."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """One such matrix C = M diag(s), M symmetric and its own inverse."""

    signs: Tensor  # (n,) float32, s
    factors: tuple[Tensor, ...]  # (m, m) float32 each, the Kronecker factors of M

    def apply(self, x: Tensor) -> Tensor:  # (..., n) -> (..., n) float32
        """C times every row of x."""
        return self._mix(x.float() * self.signs)

    def undo(self, x: Tensor) -> Tensor:  # (..., n) -> (..., n) float32
        """C^T times every row of x."""
        return self._mix(x.float()) * self.signs

    def _mix(self, x: Tensor) -> Tensor:
        after = x.shape[-1]
        for factor in self.factors:
            size = factor.shape[0]
            after //= size
            x = (factor @ x.unflatten(-1, (-1, size, after))).flatten(-3)
        return x


def rotation(seed: int, name: str, size: int, device: torch.device | str = "cpu") -> Rotation:
    """The matrix of `size` channels that a seed and a name give, the same on every machine."""
    bits = hashlib.shake_256(f"{seed} {name}".encode()).digest(-(-size // 8))
    signs = [1.0 - 2.0 * (bits[i // 8] >> i % 8 & 1) for i in range(size)]
    factors = tuple(factor.to(device) for factor in _factors(size))
    return Rotation(torch.tensor(signs, device=device), factors)


@cache
def _factors(size: int) -> tuple[Tensor, ...]:
    power = size & -size
    factors = [_hartley(size // power)] if size != power else []
    while power > 1:
        factors.append(hadamard(min(power, _LARGEST_HADAMARD)))
        power //= factors[-1].shape[0]
    return tuple(factors)


def _hartley(size: int) -> Tensor:
    """Symmetric, orthonormal, of any size, (size, size) float32."""
    index = torch.arange(size, dtype=torch.float64)
    angle = (index.unsqueeze(1) * index) % size * (2 * pi / size)
    return ((angle.cos() + angle.sin()) / size**0.5).float()
