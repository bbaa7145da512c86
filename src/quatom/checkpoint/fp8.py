"""Weights stored in FP8 (e4m3), dequantized when they are read.

A weight (N, K) comes with a scale beside it that each stored number is multiplied by, also where
its name says "inv": one for the tensor, one per row (N, 1), or one per block
(ceil(N / rows), ceil(K / columns)). The product is float32, so that nothing is rounded.

Scales may be powers of two in one byte (e8m0).

Source: DeepSeek-V3's release (block scales); compressed-tensors and fbgemm (one scale, or rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.safetensors_file import StoredTensor, read_tensor
from quatom.checkpoint.validation import instead_of
from quatom.errors import CheckpointError, ModelError

_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the KV cache: neither is in FP8 here.
_UNUSED = (
    *(".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale"),
)


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A weight in FP8 and where its scale lies."""

    stored: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]
    """Rows and columns of one scale."""

    def read(self) -> Tensor:  # (N, K) float32
        """The weight in float32."""
        weight, scale = read_tensor(self.stored).float(), read_tensor(self.scale).float()
        scale = scale.reshape(scale.shape if scale.dim() == 2 else (-1, 1))
        rows, columns = self.block
        scale = scale.repeat_interleave(rows, dim=0)[: weight.shape[0]]
        return weight.mul_(scale.repeat_interleave(columns, dim=1)[:, : weight.shape[1]])


def is_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config of config.json is of a method that stores weights in FP8."""
    return quantization.get("quant_method") in _METHODS


def scaled_tensors(
    where: Path, stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, ScaledTensor], list[str]]:
    """Tensors without scales, those that are dequantized when read, and notes.

    Args:
        where: what an error names.
        stored: tensors by name.
        quantization: quantization_config of config.json; may be empty.

    Raises:
        CheckpointError: a scale is missing, or fits no layout.
        ModelError: the method stores weights in another way.
    """
    scaled: dict[str, ScaledTensor] = {}
    scales: set[str] = set()
    for name, tensor in stored.items():
        if tensor.dtype != torch.float8_e4m3fn:
            continue
        if not name.endswith(".weight"):
            raise ModelError(
                f"{where}: {name} is in FP8 and is no weight: scales in FP8 belong to FP4 weights "
                "(NVFP4), which are not supported; use the floating-point model"
            )
        scale = next((name + end for end in _SCALES if name + end in stored), None)
        if scale is None or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{where}: {name} is in FP8 and has no {name}_scale or {name}_scale_inv beside it; "
                "use the model in bfloat16"
            )
        block = _block(where, name, tensor.shape, stored[scale].shape, quantization)
        scaled[name] = ScaledTensor(tensor, stored[scale], block)
        scales.add(scale)
    if not scaled:
        if is_fp8(quantization):
            method = quantization["quant_method"]
            raise ModelError(
                f"{where}: quantization_config.quant_method {method!r} with weights in another "
                f"format than FP8 (e4m3) is not supported; {instead_of(method)}"
            )
        return dict(stored), {}, []
    rest = {n: t for n, t in stored.items() if n not in scales and not n.endswith(_UNUSED)}
    for name, weight in scaled.items():
        rest[name] = replace(weight.stored, dtype=torch.float32)
    notes = [f"{len(scaled)} weights are in FP8 (e4m3): dequantized to float32 when they are read"]
    if unused := len(stored) - len(rest) - len(scales):
        notes.append(f"{unused} scales of activations or KV caches passed over")
    return rest, scaled, notes


def _block(
    where: Path,
    name: str,
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    quantization: Mapping[str, Any],
) -> tuple[int, int]:
    rows, columns = shape
    if scale in ((), (1,), (1, 1)):
        return rows, columns
    if scale in ((rows,), (rows, 1)):
        return 1, columns
    block = _block_size(quantization)
    if (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
        and scale == (-(-rows // block[0]), -(-columns // block[1]))
    ):
        return block[0], block[1]
    raise CheckpointError(
        f"{where}: the scale of {name} {shape} has shape {scale}, which is neither one, one per "
        f"row, nor one per block of the size in quantization_config, {block!r}; use the model in "
        "bfloat16"
    )


def _block_size(quantization: Mapping[str, Any]) -> Any:
    """Rows and columns of one scale as config.json gives them, unchecked; None: it does not."""
    groups = quantization.get("config_groups")  # of compressed-tensors
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure") is not None:
            return weights["block_structure"]
    return quantization.get("weight_block_size")
