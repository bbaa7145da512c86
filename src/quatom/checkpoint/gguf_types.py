"""Codings of GGUF tensors by number: those that can be read, and names of those that cannot."""

from functools import cache
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from quatom.errors import ModelError

# Numbers that the gguf package does not know: removed from the format, or of forks.
# Source: llama.cpp, ggml/include/ggml.h; ik_llama.cpp, ggml/include/ggml.h.
_OTHERS = {
    4: "Q4_2, which llama.cpp removed in 2023",
    5: "Q4_3, which llama.cpp removed in 2023",
    31: "Q4_0_4_4, which llama.cpp removed in 2024",
    32: "Q4_0_4_8, which llama.cpp removed in 2024",
    33: "Q4_0_8_8, which llama.cpp removed in 2024",
    36: "IQ4_NL_4_4, which llama.cpp removed in 2024, or I2_S of BitNet",
    37: "IQ4_NL_4_8, which llama.cpp removed in 2024",
    38: "IQ4_NL_8_8, which llama.cpp removed in 2024",
    42: "Q2_0, which is newer than the installed gguf package",
    137: "IQ2_K of ik_llama.cpp",
    138: "IQ3_K of ik_llama.cpp",
    139: "IQ4_K of ik_llama.cpp",
    140: "IQ5_K of ik_llama.cpp",
    141: "IQ6_K of ik_llama.cpp",
    144: "IQ4_KS of ik_llama.cpp",
    145: "IQ2_KS of ik_llama.cpp",
    146: "IQ4_KSS of ik_llama.cpp",
    152: "IQ5_KS of ik_llama.cpp",
    153: "IQ2_KT of ik_llama.cpp",
    154: "IQ3_KT of ik_llama.cpp",
    155: "IQ4_KT of ik_llama.cpp",
}
_REMEDY = "use another quantization of the model, Q8_0 or BF16 if there is one"


def quantization_type(path: Path, tensor: str, number: int) -> GGMLQuantizationType:
    """The coding of a tensor.

    Raises:
        ModelError: it is one that is not read, with its name.
    """
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        name = _OTHERS.get(number, "unknown to the installed gguf package")
        raise ModelError(
            f"{path}: tensor {tensor} has GGML type {number} ({name}), which is not supported; "
            f"{_REMEDY}"
        ) from None
    if kind not in _readable():
        raise ModelError(
            f"{path}: tensor {tensor} has GGML type {number} ({kind.name}), which the gguf package "
            f"cannot dequantize; {_REMEDY}"
        )
    return kind


@cache
def _readable() -> frozenset[GGMLQuantizationType]:
    """Codings that the gguf package turns into numbers; tried once, on one block of zeros."""
    found = set()
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, KeyError):
            continue
        found.add(kind)
    return frozenset(found)
