"""Number formats of codes: which values a code can take, and its bit pattern.

A format rounds a real number, already divided by its group's scale, to the nearest value it can
hold (ties to even, or upwards where all values are odd), and turns such values into bit patterns of
`bits` bits and back. Everything else (scales, groups, packing) is the same for all formats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quatom.errors import RecipeError

FormatName = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "odd4", "e2m1", "e4m3", "float16"
]

# The magnitudes of a 4-bit float with 2 exponent bits and 1 mantissa bit, by their 3-bit code.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Format:
    """A number format, by name: see `get_format`."""

    name: str
    bits: int
    """Bits per code."""
    largest: float
    """The value that clip_ratio * absmax is mapped onto."""
    round: Callable[[Tensor], Tensor]
    """Real numbers in units of the scale -> nearest values of the format; float32 in and out."""
    encode: Callable[[Tensor], Tensor]
    """Values of the format -> bit patterns, uint8 in the low `bits` bits."""
    decode: Callable[[Tensor], Tensor]
    """Bit patterns -> values, float32."""

    @property
    def is_integer(self) -> bool:
        """Whether values are all two's-complement integers of `bits` bits."""
        return self.name.startswith("int")

    @property
    def integer_bits(self) -> int:
        """Bits of a two's-complement integer that holds every value; 0 where none does."""
        return self.bits if self.is_integer else self.bits + 1 if self.name == "odd4" else 0

    @property
    def is_quantized(self) -> bool:
        """False for float16: values pass through and carry no scale."""
        return self.bits < 16


def _integer(bits: int) -> Format:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    mask = 2**bits - 1

    def encode(values: Tensor) -> Tensor:
        return (values.to(torch.int16) & mask).to(torch.uint8)

    def decode(patterns: Tensor) -> Tensor:
        codes = patterns.to(torch.int16)
        return torch.where(codes > high, codes - 2**bits, codes).float()

    return Format(
        name=f"int{bits}",
        bits=bits,
        largest=float(high),
        round=lambda x: torch.round(x).clamp_(low, high),
        encode=encode,
        decode=decode,
    )


def _odd4() -> Format:
    codes = _integer(4)

    return Format(
        name="odd4",
        bits=4,
        largest=15.0,
        # All of (2 c, 2 c + 2) is nearest to 2 c + 1; an even number, in the middle, goes up.
        round=lambda x: (x / 2).floor_().clamp_(-8, 7) * 2 + 1,
        encode=lambda values: codes.encode((values.float() - 1) / 2),
        decode=lambda patterns: codes.decode(patterns) * 2 + 1,
    )


def _e4m3() -> Format:
    def round_e4m3(x: Tensor) -> Tensor:
        # torch's cast turns values beyond 448 into NaN: saturate first.
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()

    return Format(
        name="e4m3",
        bits=8,
        largest=448.0,
        round=round_e4m3,
        encode=lambda values: values.to(torch.float8_e4m3fn).view(torch.uint8),
        decode=lambda patterns: patterns.view(torch.float8_e4m3fn).float(),
    )


def _e2m1() -> Format:
    magnitudes = torch.tensor(_E2M1_MAGNITUDES)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2

    def magnitude_code(x: Tensor) -> Tensor:
        size = x.abs().contiguous()
        edges = midpoints.to(size.device)
        # A midpoint belongs to the neighbour whose code is even: to the upper one when the lower
        # code is odd. bucketize counts edges below x; the two sides differ on exact midpoints only.
        below = torch.bucketize(size, edges)  # ties down
        above = torch.bucketize(size, edges, right=True)  # ties up
        return torch.where(below % 2 == 0, below, above)

    def round_e2m1(x: Tensor) -> Tensor:
        return torch.copysign(magnitudes.to(x.device)[magnitude_code(x)], x)

    def encode(values: Tensor) -> Tensor:
        return (magnitude_code(values) | (torch.signbit(values).long() << 3)).to(torch.uint8)

    def decode(patterns: Tensor) -> Tensor:
        codes = patterns.long()
        size = magnitudes.to(patterns.device)[codes & 7]
        return torch.where(codes >= 8, -size, size)

    return Format("e2m1", 4, 6.0, round_e2m1, encode, decode)


def _float16() -> Format:
    def refuse(_: Tensor) -> Tensor:
        raise RecipeError("float16 values are stored as they are and have no code")

    return Format("float16", 16, 1.0, lambda x: x.half().float(), refuse, refuse)


@cache
def get_format(name: str) -> Format:
    """The format called `name`: int2 to int8, odd4, e2m1, e4m3 or float16.

    Raises:
        RecipeError: there is no such format.
    """
    if name in ("int2", "int3", "int4", "int5", "int6", "int7", "int8"):
        return _integer(int(name[3:]))
    makers = {"odd4": _odd4, "e4m3": _e4m3, "e2m1": _e2m1, "float16": _float16}
    if name not in makers:
        raise RecipeError(
            f"unknown number format {name!r}; known: int2 to int8, {', '.join(makers)}"
        )
    return makers[name]()
