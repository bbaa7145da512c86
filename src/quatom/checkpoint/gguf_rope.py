"""Rotary scaling that a GGUF file holds as a table of divisors of the frequencies: Llama 3's.

llama.cpp rotates channel pair j by position * theta ** (-2 j / D) / table[j]. Its converter makes
the table from config.json's entries, in float32, and does not store the entries.

Source: llama.cpp, conversion of Llama models (rope_freqs).
"""

import math
from typing import Any

import torch
from torch import Tensor

ROPE_TABLE = "rope_freqs.weight"
"""Name of the table."""
# What every released model of Llama 3.1, 3.2 and 3.3 has; the factor differs.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192
# The converter computes frequencies in float32: the exponent of theta is rounded to 2**-24, and so
# a frequency to ln(theta) times that, 13 * 2**-24 for 500000. A blended divisor changes by no more
# than factor / (high - low) times as much: 2**-16 for a factor of 32.
_TOLERANCE = 2.0**-15


def llama3_scaling(table: Tensor, theta: float) -> dict[str, Any] | None:
    """The rope_scaling entry of config.json that gives this table, or None if none does.

    Args:
        table: (D / 2,) divisors of the frequencies.
        theta: base of the frequencies.
    """
    factor = float(table.max())
    if not factor > 1.0 or not math.isfinite(factor):
        return None
    expected = _divisors(len(table), theta, factor)
    if not torch.allclose(table.double(), expected, rtol=_TOLERANCE, atol=0.0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _CONTEXT,
    }


def table_scaling(table: Tensor, context: int) -> dict[str, Any]:
    """The rope_scaling entry with the table itself: longrope with one table for all lengths."""
    factors = table.tolist()
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
        "short_factor": factors,
        "long_factor": factors,
    }


def _divisors(pairs: int, theta: float, factor: float) -> Tensor:  # (pairs,) float64
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    wavelength = 2 * math.pi * theta**exponents
    kept = (_CONTEXT / wavelength - _LOW) / (_HIGH - _LOW)
    blend = kept.clamp(0.0, 1.0)  # 1: as it was, 0: divided by the factor
    return 1.0 / ((1 - blend) / factor + blend)
