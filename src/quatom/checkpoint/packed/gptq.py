"""Linears that GPTQModel or AutoGPTQ wrote.

    qweight  int32 (K * bits / 32, N)   codes, those of one column in words along K
    qzeros   int32 (G, N * bits / 32)   zero points along N: minus 1 in the first version of the
                                        format ("gptq"), as they are in the second ("gptq_v2")
    scales   float (G, N)
    g_idx    int32 (K,)                 group of each channel; neighbours without act-order

Source: https://github.com/ModelCloud/GPTQModel
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.packed.linear import Parts, Scheme, unpack_words
from quatom.checkpoint.packed.settings import integer, refuse
from quatom.checkpoint.safetensors_file import StoredTensor


@dataclass(frozen=True)
class Gptq:
    """See `PackedFormat`."""

    scheme: Scheme
    zero_offset: int
    """What is added to a stored zero point."""
    marker: str = "qweight"
    needed: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ("g_idx",)
    group_part: str = "g_idx"

    def shape(self, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """See `PackedFormat`."""
        words, rows = stored["qweight"].shape
        return rows, words * 32 // self.scheme.bits

    def codes(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        return unpack_words(parts("qweight").t(), self.scheme.bits)

    def scales(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        return parts("scales").t()

    def zeros(self, parts: Parts) -> Tensor | None:
        """See `PackedFormat`."""
        stored = unpack_words(parts("qzeros"), self.scheme.bits).t().to(torch.int16)
        return stored + self.zero_offset


def read_gptq(quantization: Mapping[str, Any]) -> Gptq:
    """The format that a quantization_config says.

    Raises:
        RecipeError: it is one that cannot be imported.
    """
    bits = integer(quantization, "bits")
    version = quantization.get("checkpoint_format") or "gptq"
    overrides = [k for k in quantization.get("dynamic") or {} if not str(k).startswith("-:")]
    refuse(
        "GPTQ",
        {
            f"bits {bits}": bits not in (4, 8),
            f"checkpoint_format {version!r}": version not in ("gptq", "gptq_v2"),
            f"pack_dtype {quantization.get('pack_dtype')!r}": quantization.get("pack_dtype")
            not in (None, "int32"),
            f"{len(overrides)} linears with settings of their own (dynamic)": bool(overrides),
        },
        "4 and 8 bits in checkpoint_format gptq and gptq_v2",
    )
    scheme = Scheme("gptq", bits, integer(quantization, "group_size"))
    return Gptq(scheme, zero_offset=1 if version == "gptq" else 0)
