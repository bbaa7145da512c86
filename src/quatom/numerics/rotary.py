"""Rotary position embedding: tables of angles, and the order of channels that kernels expect.

Kernels turn channel j of a head's first half together with channel j of its second half, by

    angle(position, j) = position * inv_freq[j],   inv_freq[j] = theta ** (-2 j / dim)

for all head_dim / 2 pairs. Where a model turns the first `dim` channels alone, or neighbouring
channels together, `head_order` moves the channels of q and k: pairs that turn come first, and the
rest are pairs whose angle is 0. Scores do not depend on the order, since q and k share it.
"""

import math

import torch
from torch import Tensor

from quatom.errors import ModelError
from quatom.families.spec import QueryGrowth, Rope, RopeScaling


def inverse_frequencies(rope: Rope, length: int) -> Tensor:
    """Angle per position of each pair that turns, scaling applied, (dim / 2,) float32.

    Args:
        rope: what config.json says.
        length: Tokens of the longest sequence; dynamic and longrope depend on it.

    Raises:
        ModelError: the scaling lacks its original_max_position.
    """
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / _periods(rope.theta, rope.dim)
    if scaling.kind == "linear":
        return 1.0 / _periods(rope.theta, rope.dim) / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(1.0 / _periods(rope.theta, rope.dim), scaling)
    if scaling.kind == "yarn":
        return _yarn(rope.theta, rope.dim, scaling)
    original = _original(scaling)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if length > original else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _periods(rope.theta, rope.dim))
    growth = scaling.factor * max(length, original) / original - (scaling.factor - 1.0)
    theta = rope.theta * growth ** (rope.dim / (rope.dim - 2)) if growth > 1.0 else rope.theta
    return 1.0 / _periods(theta, rope.dim)


def rotary_table(
    rope: Rope | None,
    head_dim: int,
    num_positions: int,
    *,
    max_length: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Cos and sin of every angle, each (num_positions, head_dim / 2) float32.

    Attention factors of yarn and longrope are in them. Pairs that do not turn have cos 1 and sin 0,
    and so has every pair where `rope` is None.

    Args:
        rope: what config.json says.
        head_dim: Channels of a head.
        num_positions: Rows of the tables.
        max_length: Tokens of the longest sequence that will be run: above the pre-training length,
            longrope takes its long factors for all positions.
        device: Where the tables are.
    """
    cos = torch.ones(num_positions, head_dim // 2)
    sin = torch.zeros(num_positions, head_dim // 2)
    if rope is not None:
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, max_length))
        factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
        cos[:, : rope.dim // 2] = angles.cos() * factor
        sin[:, : rope.dim // 2] = angles.sin() * factor
    return cos.to(device), sin.to(device)


def query_scales(
    growth: QueryGrowth | None,
    num_positions: int,
    *,
    max_length: int,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Factor of the query of each position, (num_positions,) float32.

    None: it is 1 for all positions of sequences of up to `max_length` tokens.
    """
    if growth is None or max_length <= growth.length:
        return None
    lengths = torch.arange(num_positions) // growth.length
    return (1 + growth.beta * lengths.float().log1p()).to(device)


def grow_queries(
    q: Tensor,  # (T, H, D), whole sequences of `length` tokens
    growth: QueryGrowth | None,
    length: int,
) -> Tensor:  # (T, H, D)
    """Queries times the factors of their positions; rotary embedding may come before or after."""
    scales = query_scales(growth, length, max_length=length, device=q.device)
    return q if scales is None else q * scales.repeat(len(q) // length).view(-1, 1, 1)


def head_order(rope: Rope | None, head_dim: int) -> Tensor | None:
    """Old channel at each position of a head of q and k, (head_dim,) int64; None: nothing moves.

    `head[head_order(rope, head_dim)]` is the head as `rotary_table` and the kernels expect it.
    """
    if rope is None or (rope.dim == head_dim and not rope.interleaved):
        return None
    channels = torch.arange(head_dim)
    turns, half = channels[: rope.dim], (head_dim - rope.dim) // 2
    turning = (turns[0::2], turns[1::2]) if rope.interleaved else turns.chunk(2)
    still = channels[rope.dim :].split(half) if half else (turns[:0], turns[:0])
    return torch.cat([turning[0], still[0], turning[1], still[1]])


def turn_back(
    heads: Tensor,  # (T, H, D), turned
    cos: Tensor,  # (max_position, D / 2) float32
    sin: Tensor,  # (max_position, D / 2) float32
    positions: Tensor,  # (T,) int64
) -> Tensor:  # (T, H, D)
    """Heads before rotary embedding, up to the rounding of their dtype."""
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    first, second = heads.float().chunk(2, dim=-1)
    before = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    # The square of the tables' attention factor, 1 for most models.
    return (before / (cos * cos + sin * sin).repeat(1, 1, 2)).to(heads.dtype)


def _periods(theta: float, dim: int) -> Tensor:
    """Theta ** (2 j / dim), (dim / 2,) float32."""
    return theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _original(scaling: RopeScaling) -> int:
    if scaling.original_max_position is None:
        raise ModelError(f"rotary scaling of kind {scaling.kind} needs original_max_position")
    return scaling.original_max_position


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = _original(scaling)
    wavelength = 2 * math.pi / inv_freq
    longest_kept = original / scaling.high_freq_factor
    shortest_stretched = original / scaling.low_freq_factor
    blend = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    scaled = torch.where(wavelength > shortest_stretched, inv_freq / scaling.factor, inv_freq)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_stretched)
    return torch.where(between, blended, scaled)


def _yarn(theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """Frequencies of many turns in the pre-training length are kept, of few divided by `factor`.

    Those between are blended with a ramp over the channels.
    """
    original = _original(scaling)

    def channel(turns: float) -> float:
        """The pair, not whole, whose frequency makes `turns` turns in the pre-training length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by 0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    periods = _periods(theta, dim)
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep
