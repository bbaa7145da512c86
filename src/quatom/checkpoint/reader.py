"""Model folders read one tensor at a time, with Hugging Face names whatever the format.

`open_source` reads headers only, and checks them whole: names, shapes, dtypes, file sizes. What a
long run could stumble over later fails here, before it starts.
"""

import os
from pathlib import Path

import torch

from quatom.arguments import shown
from quatom.checkpoint.configuration import as_model_config, read_recipe, with_ends
from quatom.checkpoint.contents import check_contents, exists
from quatom.checkpoint.folder_source import open_safetensors
from quatom.checkpoint.folder_tensors import adapter
from quatom.checkpoint.gguf_parts import models
from quatom.checkpoint.hub import download, download_config, hub_name
from quatom.checkpoint.language_part import language_part
from quatom.checkpoint.schema import TensorSpec, checkpoint_tensors
from quatom.checkpoint.tensor_source import TensorSource
from quatom.checkpoint.validation import check_blocks, check_names, read_json
from quatom.errors import CheckpointError
from quatom.families.spec import ModelConfig
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe

__all__ = ["TensorSource", "choose_gguf", "find_model", "open_source", "read_model_config"]

_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")


def open_source(path_or_id: str | Path) -> TensorSource:
    """Open a Hugging Face folder, a GGUF file or folder, a Quatom checkpoint or a hub id.

    Raises:
        CheckpointError: nothing is there, or files are missing, damaged or do not fit config.json.
        ModelError: the model is not supported.
        RecipeError: a Quatom checkpoint's recipe is unknown or does not fit its model.
    """
    path = find_model(path_or_id)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{path} is a file; give the folder with config.json, or a .gguf file"
            )
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a file; give the folder of a model")
    if any(path.glob("*.safetensors*")):
        return open_safetensors(path)
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
    config, _ = language_part(path / "config.json", read_json(path / "config.json"))
    return as_model_config(path / "config.json", config), read_recipe(path, config)


def find_model(path_or_id: str | Path) -> Path:
    """The folder or file of a model; one of the hub is downloaded.

    Raises:
        CheckpointError: there is no such path and no such name.
    """
    path = _local(path_or_id)
    return download(str(path_or_id)) if path is None else path


def _local(path_or_id: str | Path) -> Path | None:
    """The path of a model on disk; None: it is a name of the hub."""
    if not isinstance(path_or_id, str | Path):
        raise CheckpointError(
            f"a model is a folder, a .gguf file or a name of the hub, got {shown(path_or_id)}"
        )
    path, name = Path(path_or_id), str(path_or_id)
    if name:
        if exists(path):
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                raise CheckpointError(f"the folder {path} cannot be read: give yourself access")
            return path
        check_contents(path, text=False)  # a broken link
    if hub_name(name) is None:
        name = name[:200] if name and name.isprintable() else shown(name)
        raise CheckpointError(
            f"{name} does not exist: give a folder, a .gguf file, or a model of the "
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
