"""Checks of a model folder: every way in which files can fail to be what config.json says.

Each is a CheckpointError of one line with the file, the numbers and what to do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.contents import check_contents
from quatom.checkpoint.safetensors_file import StoredTensor, read_bytes
from quatom.checkpoint.schema import FLOAT_DTYPES, TensorSpec
from quatom.errors import CheckpointError
from quatom.json_text import parse_json

_CHUNK = 1 << 22  # elements or bytes looked at together; bounds temporary memory


PACKED_METHODS = ("gptq", "awq", "compressed-tensors")
"""quant_method of checkpoints that `quatom import` reads."""


def instead_of(method: Any) -> str:
    """What to use in place of a model whose weights another quantizer packed.

    Args:
        method: quant_method of its quantization_config.
    """
    if method in PACKED_METHODS:
        return "`quatom import` makes a Quatom checkpoint of it; or use the floating-point model"
    return "use the floating-point model, or a Quatom checkpoint"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    check_contents(file, text=True)
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold an object, it holds a {type(data).__name__}")
    return data


def check_blocks(where: Path, num_blocks: int, num_tensors: int) -> None:
    """Raise CheckpointError if a configuration asks for more blocks than there are tensors.

    Before all names of all blocks are listed: a damaged number must not fill the memory.
    """
    if num_blocks > num_tensors:
        raise CheckpointError(
            f"{where}: the configuration asks for {num_blocks} blocks and there are {num_tensors} "
            "tensors in all; configuration and weights do not belong together"
        )


def check_names(
    where: Path, expected: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """The expected tensors with their stored dtypes; every difference is a CheckpointError."""
    if missing := [name for name in expected if name not in stored]:
        if missing == ["lm_head.weight"]:
            raise CheckpointError(
                f"{where} lacks {missing[0]}, and config.json does not tie it to the embedding; "
                "set tie_word_embeddings to true if they are one, else download the model again"
            )
        raise CheckpointError(
            f"{where} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors are missing); "
            "download the model again"
        )
    # A stored head that is tied was checked to be the embedding.
    unknown = [n for n in stored if n not in expected and n != "lm_head.weight"]
    if unknown:
        raise CheckpointError(
            f"{where} holds {unknown[0]} ({len(unknown)} such tensors), which the model that "
            "config.json describes does not have; config.json and weights do not belong together"
        )
    for name, spec in expected.items():
        found = stored[name]
        if found.shape != spec.shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {found.shape}, config.json asks for "
                f"{spec.shape}; config.json and weights do not belong together"
            )
        allowed = FLOAT_DTYPES if spec.dtype is None else (spec.dtype,)
        if found.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise CheckpointError(
                f"{where}: tensor {name} is {str(found.dtype).removeprefix('torch.')}, expected "
                f"{names}; convert the model to one of these"
            )
    return {name: stored[name] for name in expected}


def check_tied(headers: Mapping[str, StoredTensor], head_name: str, embedding_name: str) -> None:
    """Raise CheckpointError if a stored head differs from the embedding it is tied to."""
    head, embedding = headers[head_name], headers.get(embedding_name)
    if embedding is not None and not same_values(head, embedding):  # a missing one is reported
        raise CheckpointError(
            f"{head.file}: {head_name} differs from {embedding_name} although config.json ties "
            f"them; set tie_word_embeddings to false, or remove {head_name}"
        )


def same_values(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two stored tensors are the same, byte for byte."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(2)]
    for start in range(0, left.num_bytes, _CHUNK):
        parts = [b[: min(_CHUNK, left.num_bytes - start)] for b in buffers]
        for part, tensor in zip(parts, (left, right), strict=True):
            read_bytes(tensor.file, tensor.start + start, part)
        if parts[0] != parts[1]:
            return False
    return True


def check_finite(file: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor of `file` holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    flat = tensor.flatten()
    bad = sum(int((~torch.isfinite(part)).sum()) for part in flat.split(_CHUNK))
    if bad:
        raise CheckpointError(
            f"{file}: tensor {name} holds {bad} NaN or infinite values of {flat.numel()}; download "
            "the model again, or repair it"
        )
