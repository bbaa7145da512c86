"""Rotary position embedding: the table of angles, with Llama-3 and linear scaling.

Channel j of a head's first half is rotated with channel j of its second half ("neox" style) by

    angle(position, j) = position * inv_freq[j],   inv_freq[j] = theta ** (-2 j / D)
"""

import math

import torch
from torch import Tensor

from quatom.modeling.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """inv_freq of each channel pair, (D / 2,) float32, scaling applied."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**pairs)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    # Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / inv_freq
    longest_kept = scaling.original_max_position / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_position / scaling.low_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    scaled = torch.where(wavelength > shortest_stretched, inv_freq / scaling.factor, inv_freq)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_stretched)
    return torch.where(between, blended, scaled)


def rotary_table(
    config: ModelConfig, num_positions: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cos and sin of every angle, each (num_positions, D / 2) float32."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)
