"""A linear that another tool quantized: integer codes, scales, zero points and groups.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g])        g: the group of channel k

with codes of `bits` bits from 0 on. Every format says these four in tensors of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from quatom.checkpoint.safetensors_file import StoredTensor, read_tensor
from quatom.errors import CheckpointError, RecipeError
from quatom.numerics.packing import unpack_bits

Parts = Callable[[str], Tensor]
"""Stored tensors of a linear by the last part of their names."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a whole checkpoint is quantized."""

    method: str
    """For messages and the recipe's name: "gptq"."""
    bits: int
    group_size: int
    """Channels of a group; -1: all of a row."""
    activations: Literal["float16", "int8"] = "float16"
    """int8: one symmetric scale per token, found as it runs."""

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def groups(self, channels: int) -> int:
        """Groups of a row."""
        return 1 if self.group_size == -1 else -(-channels // self.group_size)


class PackedFormat(Protocol):
    """How one tool stores linears."""

    @property
    def scheme(self) -> Scheme:
        """What a code means."""

    @property
    def marker(self) -> str:
        """Last part of the name of the codes, which every quantized linear has."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Last parts of the names that every linear has."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Those that it may have."""

    @property
    def group_part(self) -> str:
        """Last part of the name of (K,), the group of each channel; without it: neighbours."""

    def shape(self, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """(N, K) from the shapes of the parts."""

    def codes(self, parts: Parts) -> Tensor:
        """(N, K) uint8, or int16 where they are signed and were moved."""

    def scales(self, parts: Parts) -> Tensor:
        """(N, G), or (1, 1) for one of all."""

    def zeros(self, parts: Parts) -> Tensor | None:
        """(N, G) int16; None: the scheme's middle everywhere."""


@dataclass(frozen=True)
class PackedLinear:
    """One quantized linear of a file. Nothing is read before it is asked for."""

    name: str
    form: PackedFormat
    stored: Mapping[str, StoredTensor]
    """By the last part of their names."""

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.form.shape(self.stored)

    @property
    def header(self) -> StoredTensor:
        """What stands for the weight among the headers of a folder."""
        return replace(self.stored[self.form.marker], shape=self.shape, dtype=torch.float32)

    def _part(self, suffix: str) -> Tensor:
        return read_tensor(self.stored[suffix])

    def scales(self) -> Tensor:  # (N, G) float16
        """Scales as they are stored, one of all rows repeated.

        Raises:
            CheckpointError: there is another number of them.
            RecipeError: one is no float16 number.
        """
        stored = self.form.scales(self._part)
        wanted = self.shape[0], self.form.scheme.groups(self.shape[1])
        stored = stored.expand(wanted) if stored.shape == (1, 1) else stored
        scales = self._of_shape("scales", stored, wanted).half()
        rounded = scales.double() != stored.double()
        if bool(rounded.any()):
            raise RecipeError(
                f"{self._file}: {int(rounded.sum())} of {rounded.numel()} scales of {self.name} "
                f"({stored.dtype}) are no float16 numbers, the first is {stored[rounded][0]:.9g}: "
                "a Quatom checkpoint would round them"
            )
        return scales

    def zeros(self) -> Tensor | None:  # (N, G) int16
        """Zero points; None: all are the middle of the codes' range."""
        zeros = self.form.zeros(self._part)
        if zeros is None:
            return None
        wanted = self.shape[0], self.form.scheme.groups(self.shape[1])
        self._of_shape("zero points", zeros, wanted)
        return None if bool((zeros == self.form.scheme.middle).all()) else zeros

    def groups(self) -> Tensor | None:  # (K,) int64
        """The group of each channel; None: groups are of neighbours.

        Raises:
            CheckpointError: a group has another number of channels than the scheme says.
        """
        if self.form.group_part not in self.stored:
            return None
        neighbours, size = self._neighbours(), self.form.scheme.group_size
        groups = self._part(self.form.group_part).long()
        self._of_shape("groups of channels", groups, (self.shape[1],))
        if torch.equal(groups, neighbours):
            return None
        if not torch.equal(groups.sort().values, neighbours):
            raise CheckpointError(
                f"{self._file}: groups of {self.name} are not of {size} channels each, which "
                "quantization_config says; the checkpoint is damaged: download it again"
            )
        return groups

    def values(self) -> Tensor:  # (N, K) int8
        """Codes minus zero points: what is multiplied by the scales.

        Raises:
            CheckpointError: they take more than eight bits.
        """
        values = self.form.codes(self._part).to(torch.int16)
        if (zeros := self.zeros()) is None:
            values -= self.form.scheme.middle
        else:
            values -= zeros.index_select(1, self.group_of_channels())
        self._of_shape("codes", values, self.shape)
        if int(values.min()) < -128 or int(values.max()) > 127:
            raise CheckpointError(
                f"{self._file}: codes minus zero points of {self.name} take more than 8 bits"
            )
        return values.to(torch.int8)

    def group_of_channels(self) -> Tensor:  # (K,) int64
        """The group of each channel, whatever it is made of."""
        groups = self.groups()
        return self._neighbours() if groups is None else groups

    def _neighbours(self) -> Tensor:  # (K,) int64
        channels, size = self.shape[1], self.form.scheme.group_size
        return torch.arange(channels) // (channels if size == -1 else size)

    def read(self) -> Tensor:  # (N, K) float32
        """`values`, in place of the weight of a floating-point model."""
        return self.values().float()

    @property
    def _file(self) -> str:
        return str(self.stored[self.form.marker].file)

    def _of_shape(self, what: str, tensor: Tensor, wanted: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{self._file}: {what} of {self.name} have shape {tuple(tensor.shape)}, a weight "
                f"{self.shape} in groups of {self.form.scheme.group_size} has {wanted}; "
                "quantization_config and weights do not belong together"
            )
        return tensor


def unpack_words(words: Tensor, bits: int) -> Tensor:  # (..., W) int32 -> (..., 32 W / bits) uint8
    """Codes of 4 or 8 bits in 32-bit words, the first in the lowest bits."""
    return unpack_bits(words.contiguous().view(torch.uint8), bits)
