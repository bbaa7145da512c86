"""A folder of safetensors files as a `TensorSource`: headers read, every name and shape checked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quatom.checkpoint.configuration import as_model_config, read_recipe, with_ends
from quatom.checkpoint.contents import is_present
from quatom.checkpoint.expert_tensors import join_experts
from quatom.checkpoint.folder_tensors import (
    adapter,
    embedding_from_head,
    pass_over,
    plain_names,
    read_headers,
)
from quatom.checkpoint.fp8 import scaled_tensors
from quatom.checkpoint.implicit_norms import implicit_norms
from quatom.checkpoint.language_part import language_part
from quatom.checkpoint.mxfp4 import block_scaled_tensors
from quatom.checkpoint.safetensors_file import StoredTensor, read_tensor
from quatom.checkpoint.schema import TensorSpec, checkpoint_tensors
from quatom.checkpoint.tensor_source import TensorSource
from quatom.checkpoint.validation import check_blocks, check_names, check_tied, read_json
from quatom.errors import CheckpointError
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import Recipe


class Readable(Protocol):
    """A tensor that is made of several stored ones when it is read."""

    def read(self) -> Tensor:
        """The tensor."""


Convert = Callable[
    [Path, Mapping[str, StoredTensor], Mapping[str, Any]],
    tuple[dict[str, StoredTensor], Mapping[str, Readable], list[str]],
]
"""Folder, stored tensors and quantization_config of a model that is none of ours -> its tensors as
a floating-point model has them, those that are made when they are read, and notes."""


def open_safetensors(
    folder: Path,
    recipe_of: Callable[[Path, Mapping[str, Any]], Recipe | None] = read_recipe,
    convert: Convert | None = None,
) -> TensorSource:
    """Open a folder of safetensors files.

    Args:
        folder: with config.json.
        recipe_of: the recipe that a folder and its configuration say.
        convert: for a model without recipe; None: FP8 and MXFP4 become floating point.

    Raises:
        CheckpointError, ModelError, RecipeError: as `open_source`.
    """
    if not is_present(folder / "config.json"):
        raise CheckpointError(
            adapter(folder)
            or f"{folder} has no config.json; copy the model's own there, in the "
            "form of transformers"
        )
    config, part = language_part(folder / "config.json", read_json(folder / "config.json"))
    recipe = recipe_of(folder, config)
    model_config = as_model_config(folder / "config.json", config)
    model_config, ends = with_ends(model_config, folder / "generation_config.json")
    headers, notes = read_headers(folder)
    check_blocks(folder, model_config.num_layers, len(headers))
    resolved = plan(model_config, recipe or PRESETS["fp16"])
    expected = checkpoint_tensors(resolved)
    headers, renamed = plain_names(folder, headers, expected)
    headers, passed = pass_over(
        headers,
        # A head that is stored although it is tied is compared below.
        (*expected, model_config.head_name),
        model_config.unused_prefixes,
        of_larger=bool(part),
    )
    if model_config.tie_word_embeddings:
        head, embedding = model_config.head_name, model_config.embedding_name
        headers, moved = embedding_from_head(headers, head, embedding)
        passed += moved
        if head in headers:
            check_tied(headers, head, embedding)
    made: Mapping[str, Readable] = {}
    converted: list[str] = []
    if recipe is None:
        quantization = config.get("quantization_config") or {}
        headers, made, converted = (convert or _dequantized)(folder, headers, quantization)
    stored = {name: TensorSpec(t.shape, t.dtype) for name, t in headers.items()}
    if recipe is None:
        like = stored.get(model_config.embedding_name, TensorSpec((), torch.float32))
        ones = implicit_norms(folder, resolved, stored, like.dtype or torch.float32)
        made = {**made, **ones}
        stored |= {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in ones.items()}
    stored, joined = join_experts(folder, resolved, stored)
    tensors = check_names(folder, expected, stored)
    parts = {name: joined[name].names if name in joined else [name] for name in tensors}

    stored_parts = {part for name in tensors for part in parts[name]}

    def file_of(part: str) -> Path:
        return headers[part].file if part in headers else folder / "config.json"

    def read(name: str) -> Tensor:
        if name in joined:
            return joined[name].read(read)
        return made[name].read() if name in made else read_tensor(headers[name])

    return TensorSource(
        folder=folder,
        config_dict=config,
        model_config=model_config,
        recipe=recipe,
        gguf=None,
        _files=tuple(sorted({headers[part].file for part in stored_parts if part in headers})),
        _tensors=tensors,
        _read=read,
        _locate=lambda name: file_of(parts[name][0]),
        notes=(*part, *ends, *notes, *renamed, *passed, *converted),
    )


def _dequantized(
    folder: Path, headers: Mapping[str, StoredTensor], quantization: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], Mapping[str, Readable], list[str]]:
    stored, fp8, from_fp8 = scaled_tensors(folder, headers, quantization)
    stored, mxfp4, from_mxfp4 = block_scaled_tensors(folder, stored, quantization)
    return stored, {**fp8, **mxfp4}, from_fp8 + from_mxfp4
