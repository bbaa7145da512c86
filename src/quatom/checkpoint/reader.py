"""Model folders read one tensor at a time, with Hugging Face names whatever the format.

`open_source` reads headers only, and checks them whole: names, shapes, dtypes, file sizes. What a
long run could stumble over later fails here, before it starts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.configuration import as_model_config, read_recipe, with_ends
from quatom.checkpoint.contents import check_contents, exists, is_present
from quatom.checkpoint.expert_tensors import join_experts
from quatom.checkpoint.folder_tensors import (
    adapter,
    embedding_from_head,
    pass_over,
    plain_names,
    read_headers,
)
from quatom.checkpoint.fp8 import ScaledTensor, scaled_tensors
from quatom.checkpoint.gguf_parts import models
from quatom.checkpoint.hub import download, download_config, hub_name
from quatom.checkpoint.mxfp4 import BlockScaledTensor, block_scaled_tensors
from quatom.checkpoint.safetensors_file import read_bytes, read_tensor
from quatom.checkpoint.schema import TensorSpec, checkpoint_tensors
from quatom.checkpoint.validation import (
    check_blocks,
    check_finite,
    check_names,
    check_tied,
    read_json,
)
from quatom.errors import CheckpointError
from quatom.families.spec import ModelConfig
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe

_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")


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


def open_source(path_or_id: str | Path) -> TensorSource:
    """Open a Hugging Face folder, a GGUF file or folder, a Quatom checkpoint or a hub id.

    Raises:
        CheckpointError: nothing is there, or files are missing, damaged or do not fit config.json.
        ModelError: the model is not supported.
        RecipeError: a Quatom checkpoint's recipe is unknown or does not fit its model.
    """
    path = _local(path_or_id)
    if path is None:
        path = download(str(path_or_id))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{path} is a file; give the folder with config.json, or a .gguf file"
            )
        return _open_gguf(path)
    if any(path.glob("*.safetensors*")):
        return _open_safetensors(path)
    if (gguf := choose_gguf(path)) is not None:
        return _open_gguf(gguf)
    if (reason := adapter(path)) is not None:
        raise CheckpointError(reason)
    others = sorted(f.name for f in path.iterdir() if f.suffix.lower() in _OTHER_WEIGHTS)
    reason = f"only {others[0]}; convert it to safetensors" if others else "no weights"
    raise CheckpointError(f"{path} holds {reason}: a *.safetensors or *.gguf file is needed")


def read_model_config(path_or_id: str | Path) -> tuple[ModelConfig, Recipe | None]:
    """What a model computes, and the recipe of a checkpoint; weights are neither read nor needed.

    Raises:
        CheckpointError: there is no config.json and no GGUF file.
        ModelError: the model is not supported.
    """
    path = _local(path_or_id)
    if path is None:
        repository, file = hub_name(str(path_or_id)) or ("", None)
        path = download_config(repository) if file is None else download(str(path_or_id))
    gguf = path if path.is_file() else None
    if gguf is None and not (path / "config.json").exists():
        gguf = choose_gguf(path)
    if gguf is not None:
        from quatom.checkpoint.gguf_file import read_split_gguf
        from quatom.checkpoint.gguf_model import hf_config

        return as_model_config(gguf, hf_config(read_split_gguf(gguf))), None
    config = read_json(path / "config.json")
    return as_model_config(path / "config.json", config), read_recipe(path, config)


def _local(path_or_id: str | Path) -> Path | None:
    """The path of a model on disk; None: it is a name of the hub."""
    path = Path(path_or_id)
    if str(path_or_id):
        if exists(path):
            return path
        check_contents(path, text=False)  # a broken link
    if hub_name(str(path_or_id)) is None:
        raise CheckpointError(
            f"{path_or_id!s:.200} does not exist: give a folder, a .gguf file, or a model of the "
            "hub as ORGANIZATION/NAME"
        )
    return None


def choose_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder, the first part of a split one; None if there is none.

    Raises:
        CheckpointError: there are several models.
    """
    found = models(folder.iterdir())
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise CheckpointError(
            f"{folder} holds {len(found)} .gguf files ({names}...); name one of them"
        )
    return found[0] if found else None


def _open_gguf(path: Path) -> TensorSource:
    from quatom.checkpoint.gguf_file import read_split_gguf
    from quatom.checkpoint.gguf_model import IGNORED, hf_config, hf_names, read_as_hf

    file = read_split_gguf(path)
    config = hf_config(file)
    model_config, ends = with_ends(as_model_config(path, config), None)
    check_blocks(path, model_config.num_layers, len(file.tensors))
    own_names = hf_names(file)
    stored = {
        name: TensorSpec(file.tensors[own].shape, torch.float32)
        for name, own in own_names.items()
        if own not in IGNORED
    }
    tensors = check_names(path, checkpoint_tensors(plan(model_config, PRESETS["fp16"])), stored)
    return TensorSource(
        folder=path.parent,
        config_dict=config,
        model_config=model_config,
        recipe=None,
        gguf=file.path,
        _files=tuple(sorted({tensor.file for tensor in file.tensors.values()})),
        _tensors=tensors,
        _read=lambda name: read_as_hf(file, name, own_names[name]),
        _locate=lambda name: path,
        notes=tuple(ends),
    )


def _open_safetensors(folder: Path) -> TensorSource:
    if not is_present(folder / "config.json"):
        raise CheckpointError(
            adapter(folder)
            or f"{folder} has no config.json; copy the model's own there, in the "
            "form of transformers"
        )
    config = read_json(folder / "config.json")
    recipe = read_recipe(folder, config)
    model_config = as_model_config(folder / "config.json", config)
    model_config, ends = with_ends(model_config, folder / "generation_config.json")
    headers, notes = read_headers(folder)
    check_blocks(folder, model_config.num_layers, len(headers))
    resolved = plan(model_config, recipe or PRESETS["fp16"])
    expected = checkpoint_tensors(resolved)
    headers, renamed = plain_names(folder, headers, expected)
    headers, passed = pass_over(headers, expected, model_config.unused_prefixes)
    if model_config.tie_word_embeddings:
        head, embedding = model_config.head_name, model_config.embedding_name
        headers, moved = embedding_from_head(headers, head, embedding)
        passed += moved
        if head in headers:
            check_tied(headers, head, embedding)
    scaled: dict[str, ScaledTensor | BlockScaledTensor] = {}
    converted: list[str] = []
    if recipe is None:
        quantization = config.get("quantization_config") or {}
        headers, fp8, from_fp8 = scaled_tensors(folder, headers, quantization)
        headers, mxfp4, from_mxfp4 = block_scaled_tensors(folder, headers, quantization)
        scaled, converted = {**fp8, **mxfp4}, from_fp8 + from_mxfp4
    stored = {name: TensorSpec(t.shape, t.dtype) for name, t in headers.items()}
    stored, joined = join_experts(folder, resolved, stored)
    tensors = check_names(folder, expected, stored)
    parts = {name: joined[name].names if name in joined else [name] for name in tensors}

    def read(name: str) -> Tensor:
        if name in joined:
            return joined[name].read(read)
        return scaled[name].read() if name in scaled else read_tensor(headers[name])

    return TensorSource(
        folder=folder,
        config_dict=config,
        model_config=model_config,
        recipe=recipe,
        gguf=None,
        _files=tuple(sorted({headers[part].file for name in tensors for part in parts[name]})),
        _tensors=tensors,
        _read=read,
        _locate=lambda name: headers[parts[name][0]].file,
        notes=(*ends, *notes, *renamed, *passed, *converted),
    )
