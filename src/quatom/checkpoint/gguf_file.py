"""GGUF files, version 2 and 3: metadata, and tensors dequantized to float32 one at a time.

A model may be split: NAME-00001-of-00003.gguf and so on, the metadata in the first part.

    magic "GGUF", version, tensor count, metadata count
    metadata: key, type, value ...        tensors: name, dimensions, type, offset ...
    padding to the alignment, then the tensors' bytes

Strings are a 64-bit length and UTF-8. Dimensions are listed fastest first, so that a linear of N
rows and K columns reads [K, N].

Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from quatom.checkpoint.contents import check_contents, is_present
from quatom.checkpoint.gguf_parts import split_parts
from quatom.checkpoint.gguf_types import quantization_type
from quatom.checkpoint.safetensors_file import read_bytes
from quatom.errors import CheckpointError, ModelError

# Metadata value types by number; 8 is a string, 9 an array.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_CHUNK = 1 << 20  # elements dequantized together


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies and how it is coded."""

    file: Path
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch."""
    quantization: GGMLQuantizationType
    start: int
    """Byte of the file at which the tensor begins."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The head of a GGUF file, of all parts of a split one."""

    path: Path
    """The file; the first part of several."""
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_split_gguf(path: Path) -> GGUFFile:
    """`read_gguf` of a whole model, from any one of its parts.

    Raises:
        CheckpointError: a part is missing, or is not what its name says.
        ModelError: a tensor is coded in a way that is not supported.
    """
    parts = split_parts(path)
    if missing := [part.name for part in parts if not is_present(part)]:
        raise CheckpointError(
            f"{path} is one of {len(parts)} parts and {missing[0]} is missing ({len(missing)} in "
            "all); download it into the same folder"
        )
    files = [read_gguf(part) for part in parts]
    tensors: dict[str, GGUFTensor] = {}
    for number, file in enumerate(files):
        said = (file.metadata.get("split.no", 0), file.metadata.get("split.count", 0) or 1)
        if said != (number, len(parts)):
            raise CheckpointError(
                f"{file.path} says that it is part {said[0]} of {said[1]}, counted from 0, and its "
                f"name that it is {number} of {len(parts)}; give all parts the names they came with"
            )
        if twice := tensors.keys() & file.tensors.keys():
            raise CheckpointError(f"{file.path} holds {min(twice)}, which another part holds too")
        tensors |= file.tensors
    return GGUFFile(files[0].path, files[0].metadata, tensors)


def read_gguf(path: Path) -> GGUFFile:
    """Metadata and tensor positions of a GGUF file; tensors themselves are not read.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or of another version.
        ModelError: a tensor is coded in a way that is not supported.
    """
    check_contents(path, text=False)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
            version = _scalar(stream, "<I")
            if version not in (2, 3):
                raise CheckpointError(
                    f"{path} has GGUF version {version}; supported are 2 and 3, little-endian"
                )
            num_tensors, num_entries = _scalar(stream, "<Q"), _scalar(stream, "<Q")
            metadata = {}
            for _ in range(num_entries):
                key = _name(stream, size)
                metadata[key] = _value(stream, _scalar(stream, "<I"), size)
            entries = [_tensor_entry(stream, size) for _ in range(num_tensors)]
            alignment = int(metadata.get("general.alignment", 32))
            data_start = -(-stream.tell() // alignment) * alignment
        tensors = {
            name: _locate(path, name, shape, kind, data_start + offset)
            for name, shape, kind, offset in entries
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ModelError:
        raise
    except (EOFError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = error if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or damaged ({reason}); download it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.start + tensor.num_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte "
                f"{tensor.start + tensor.num_bytes}, the file has {size}; download it again"
            )
    return GGUFFile(path, metadata, tensors)


def read_gguf_tensor(tensor: GGUFTensor) -> Tensor:
    """Dequantize one tensor to float32.

    Raises:
        CheckpointError: the file cannot be read.
    """
    rows = prod(tensor.shape[:-1])
    row_bytes = tensor.num_bytes // max(rows, 1)
    out = torch.empty(rows, tensor.shape[-1])
    # Piece by piece, because dequantizing needs several times the memory of its result.
    step = max(_CHUNK // tensor.shape[-1], 1)
    raw = np.empty((min(step, rows), row_bytes), dtype=np.uint8)
    for first in range(0, rows, step):
        piece = raw[: min(step, rows - first)]
        read_bytes(tensor.file, tensor.start + first * row_bytes, piece.reshape(-1).data)
        values = dequantize(piece, tensor.quantization)
        out[first : first + len(piece)] = torch.from_numpy(values)
    return out.view(tensor.shape)


def _scalar(stream: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, _take(stream, struct.calcsize(layout)))[0]


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"{count} bytes expected at byte {stream.tell() - len(data)}")
    return data


def _name(stream: BinaryIO, limit: int) -> str:
    """A key or the name of a tensor, which errors may show."""
    name = _string(stream, limit)
    if not name.isprintable():
        raise ValueError(f"a name {name[:80]!r}")
    return name


def _string(stream: BinaryIO, limit: int) -> str:
    length = _scalar(stream, "<Q")
    if length > limit:
        raise ValueError(f"a string of {length} bytes in a file of {limit}")
    return _take(stream, length).decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int, limit: int) -> Any:
    if kind == _STRING:
        return _string(stream, limit)
    if kind != _ARRAY:
        return _scalar(stream, _SCALARS[kind])
    kind, count = _scalar(stream, "<I"), _scalar(stream, "<Q")
    if count > limit:
        raise ValueError(f"an array of {count} entries in a file of {limit} bytes")
    if kind in (_STRING, _ARRAY):
        return [_value(stream, kind, limit) for _ in range(count)]
    layout = _SCALARS[kind]
    if count * struct.calcsize(layout) > limit:
        raise ValueError(f"an array of {count} entries in a file of {limit} bytes")
    packed = _take(stream, count * struct.calcsize(layout))
    return [entry[0] for entry in struct.iter_unpack(layout, packed)]


def _tensor_entry(stream: BinaryIO, limit: int) -> tuple[str, tuple[int, ...], int, int]:
    name = _name(stream, limit)
    num_dimensions = _scalar(stream, "<I")
    if num_dimensions > 4:
        raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
    shape = tuple(_scalar(stream, "<Q") for _ in range(num_dimensions))[::-1]
    return name, shape, _scalar(stream, "<I"), _scalar(stream, "<Q")


def _locate(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
    quantization = quantization_type(path, name, kind)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of shape {shape} does not divide into blocks of {block}")
    return GGUFTensor(path, shape, quantization, start, prod(shape) // block * block_bytes)
