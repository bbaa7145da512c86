"""A model on disk, whatever its format: tensors by Hugging Face names, one at a time."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.safetensors_file import read_bytes
from quatom.checkpoint.schema import TensorSpec
from quatom.checkpoint.validation import check_finite
from quatom.errors import CheckpointError
from quatom.families.spec import ModelConfig
from quatom.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A model on disk. Holds no tensor and no open file between calls."""

    folder: Path
    """Where tokenizer and configuration files lie; the folder of a single GGUF file."""
    config_dict: dict[str, Any]
    """config.json, made from the metadata for a GGUF file."""
    model_config: ModelConfig
    recipe: Recipe | None
    """None: a floating-point model."""
    gguf: Path | None
    """The GGUF file, None for safetensors."""
    _files: tuple[Path, ...]
    _tensors: Mapping[str, TensorSpec]
    _read: Callable[[str], Tensor]
    _locate: Callable[[str], Path]
    notes: tuple[str, ...] = ()
    """What was passed over, read under another name or converted, a sentence each."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that tensors are read from."""
        return self._files

    def names(self) -> list[str]:
        """All tensors, in the order of the network."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as `load` returns it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        dtype = self._spec(name).dtype
        assert dtype is not None
        return dtype

    def load(self, name: str, expected_shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one tensor from disk into memory of its own.

        Raises:
            CheckpointError: there is no such tensor, its shape is not the expected one, the file
                cannot be read, or the tensor holds NaN or infinity.
        """
        spec = self._spec(name)
        if expected_shape is not None and spec.shape != tuple(expected_shape):
            raise CheckpointError(
                f"{self._locate(name)}: tensor {name} has shape {spec.shape}, expected "
                f"{tuple(expected_shape)}; config.json and weights do not belong together"
            )
        tensor = self._read(name)
        check_finite(self._locate(name), name, tensor)
        return tensor

    def fingerprint(self) -> str:
        """A hash that changes with the model: its configuration, sizes and samples of its bytes.

        Reads at most 64 pieces of 64 KiB of each file, so that it stays fast for large models.
        """
        digest = hashlib.sha256(json.dumps(self.config_dict, sort_keys=True).encode())
        piece = memoryview(bytearray(1 << 16))
        for file in self._files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            count = min(64, -(-size // len(piece)))
            for i in range(count):
                start = i * max(size - len(piece), 0) // max(count - 1, 1)
                view = piece[: min(len(piece), size - start)]
                read_bytes(file, start, view)
                digest.update(view)
        return digest.hexdigest()

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._tensors[name]
