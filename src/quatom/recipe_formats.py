"""Number formats that recipes name, and the bits of their codes."""

from typing import Literal

WeightFormat = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "odd4", "e2m1", "float16"
]
ActivationFormat = Literal["int3", "int4", "int8", "e4m3", "e2m1", "float16"]
KVFormat = Literal["int4", "int8", "float16"]

BITS = {"odd4": 4, "e2m1": 4, "e4m3": 8, "float16": 16} | {f"int{b}": b for b in range(2, 9)}
"""Bits per code, scales not counted."""
