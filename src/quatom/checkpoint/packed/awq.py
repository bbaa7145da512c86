"""Linears that AutoAWQ wrote, version "gemm".

    qweight  int32 (K, N / 8)   eight codes of a channel in a word along N, in the order of `_ORDER`
    qzeros   int32 (G, N / 8)   zero points in the same order
    scales   float (G, N)

Source: https://github.com/casper-hansen/AutoAWQ
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.packed.linear import Parts, Scheme, unpack_words
from quatom.checkpoint.packed.settings import integer, refuse
from quatom.checkpoint.safetensors_file import StoredTensor
from quatom.numerics.reorder import inverse_order

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row, within eight, whose code is in each four bits of a word, from the lowest on."""


@dataclass(frozen=True)
class Awq:
    """See `PackedFormat`."""

    scheme: Scheme
    marker: str = "qweight"
    needed: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ()
    group_part: str = "g_idx"

    def shape(self, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """See `PackedFormat`."""
        channels, words = stored["qweight"].shape
        return words * 8, channels

    def codes(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        return _unpack(parts("qweight")).t()

    def scales(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        return parts("scales").t()

    def zeros(self, parts: Parts) -> Tensor | None:
        """See `PackedFormat`."""
        return _unpack(parts("qzeros")).t().to(torch.int16)


def _unpack(words: Tensor) -> Tensor:  # (..., N / 8) int32 -> (..., N) uint8
    eights = unpack_words(words, 4).unflatten(-1, (-1, 8))
    return eights[..., inverse_order(torch.tensor(_ORDER))].flatten(-2)


def read_awq(quantization: Mapping[str, Any]) -> Awq:
    """The format that a quantization_config says.

    Raises:
        RecipeError: it is one that cannot be imported.
    """
    older = {"w_bit": "bits", "q_group_size": "group_size"}  # names in quant_config.json
    given = {older.get(key, key): value for key, value in quantization.items()}
    bits, version = integer(given, "bits"), str(given.get("version", "gemm")).lower()
    refuse(
        "AWQ",
        {f"bits {bits}": bits != 4, f"version {version!r}": version != "gemm"},
        "4 bits in version gemm",
    )
    return Awq(Scheme("awq", bits, integer(given, "group_size")))
