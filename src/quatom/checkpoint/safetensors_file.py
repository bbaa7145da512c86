"""Safetensors files read and written tensor by tensor, without a memory map.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes.
Reading goes through file offsets into memory of its own: pages of a map would count as resident
for as long as the map lives, and streaming a model block by block would still fill the memory.

Source: the format's specification, https://github.com/huggingface/safetensors.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quatom.checkpoint.contents import check_contents
from quatom.errors import CheckpointError
from quatom.json_text import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Byte of the file at which the tensor begins."""
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    check_contents(file, text=False)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: its header would take {length} "
                    f"bytes, the file has {size}; download it again"
                )
            header = parse_json(stream.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            tensors = {
                name: _entry(file, name, 8 + length, entry) for name, entry in entries.items()
            }
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({error!r}); download it again"
        ) from error
    described = 8 + length
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)
    ):
        if tensor.start != described:
            raise CheckpointError(
                f"{file} is truncated or damaged: tensor {name} begins at byte {tensor.start} and "
                f"the one before it ends at {described}; download it again"
            )
        described += tensor.num_bytes
    if described != size:
        raise CheckpointError(
            f"{file} is truncated or damaged: its header describes {described} bytes, the file has "
            f"{size}; download it again"
        )
    return tensors


def _entry(file: Path, name: str, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    if not name.isprintable():  # errors may show it
        raise ValueError(f"a tensor is named {name!r}")
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {entry['dtype']!r}, which is not supported; use the "
            "model in bfloat16"
        )
    shape = tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    if start < 0 or end - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} gives {end - start} bytes")
    return StoredTensor(file, shape, dtype, data_start + start, end - start)


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor, in memory of its own.

    Raises:
        CheckpointError: the file cannot be read, or became shorter.
    """
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    read_bytes(stored.file, stored.start, raw.numpy().data)
    return raw.view(stored.dtype).view(stored.shape)


def read_bytes(file: Path, start: int, into: memoryview) -> None:
    """Fill `into` from the file's byte `start` on."""
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            done = 0
            while done < len(into) and (count := stream.readinto(into[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if done != len(into):
        raise CheckpointError(
            f"{file} is truncated: bytes {start} to {start + len(into)} were expected, the file "
            f"has {file.stat().st_size}; download it again"
        )


def write_tensors(
    stream: BinaryIO,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],  # shape and dtype by name
    load: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The same tensors give the same bytes, whatever their order: they lie sorted by falling item
    size, then name, so that each starts at a multiple of its item size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, dtype = tensors[name]
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for name in names:
        tensor = load(name)
        assert (tuple(tensor.shape), tensor.dtype) == tensors[name], name
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)


def fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
