"""Weights of experts stored in MXFP4, dequantized when they are read.

Of a tensor (E, N, K), NAME_blocks (E, N, K / 32, 16) uint8 holds codes, two in a byte, the first in
its low bits, and NAME_scales (E, N, K / 32) uint8 the exponent plus 127 of a power of two for each
32 of them. The products are numbers of bfloat16, so that nothing is rounded.

Source: OCP Microscaling Formats (MX) 1.0; gpt-oss (OpenAI, 2025) for the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.checkpoint.safetensors_file import StoredTensor, read_tensor
from quatom.errors import CheckpointError, ModelError
from quatom.numerics.formats import get_format

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
_KNOWN_KEYS = {"quant_method", "modules_to_not_convert", "dequantize"}
"""Of quantization_config. Which modules are in MXFP4 is seen from the tensors."""


@dataclass(frozen=True, slots=True)
class BlockScaledTensor:
    """A weight in MXFP4: where its codes and its scales lie."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * _BLOCK)

    def read(self) -> Tensor:  # (E, N, K) bfloat16
        """The weight in bfloat16, one expert dequantized after another."""
        blocks, scales = read_tensor(self.blocks), read_tensor(self.scales)
        whole = torch.empty(self.shape, dtype=torch.bfloat16)
        for out, codes, exponents in zip(whole, blocks, scales, strict=True):
            out.copy_(dequantize_mxfp4(codes, exponents))
        return whole


def dequantize_mxfp4(
    blocks: Tensor,  # (N, G, 16) uint8
    scales: Tensor,  # (N, G) uint8
) -> Tensor:  # (N, 32 G) float32
    """Numbers of MXFP4 codes; infinite or NaN where the exponent is beyond the format's."""
    values = get_format("e2m1").decode(torch.arange(16))
    byte = torch.arange(256)
    pairs = torch.stack((values[byte % 16], values[byte // 16]), dim=1)  # (256, 2)
    factors = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).float()
    numbers = pairs[blocks.int()].flatten(-2)  # (N, G, 32)
    return numbers.mul_(factors[scales.int()].unsqueeze(-1)).flatten(-2)


def is_mxfp4(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config of config.json is that of MXFP4."""
    return quantization.get("quant_method") == "mxfp4"


def block_scaled_tensors(
    where: Path, stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, BlockScaledTensor], list[str]]:
    """Tensors without scales, those that are dequantized when read, and notes.

    What is dequantized keeps the name of its codes.

    Args:
        where: what an error names.
        stored: tensors by name.
        quantization: quantization_config of config.json; may be empty.

    Raises:
        CheckpointError: codes or scales are missing, or do not fit each other.
        ModelError: quantization_config has a key that is not known.
    """
    if not is_mxfp4(quantization):
        return dict(stored), {}, []
    if unknown := sorted(quantization.keys() - _KNOWN_KEYS):
        raise ModelError(
            f"{where}: quantization_config of method mxfp4 has {', '.join(unknown)}, which may "
            "change what the numbers mean; use the model in bfloat16"
        )
    packed: dict[str, BlockScaledTensor] = {}
    scales: set[str] = set()
    for name, tensor in stored.items():
        if not name.endswith(_BLOCKS):
            continue
        scale = name.removesuffix(_BLOCKS) + _SCALES
        if scale not in stored:
            raise CheckpointError(f"{where} lacks {scale}, the scales of {name}; download it again")
        packed[name] = _checked(where, name, tensor, stored[scale])
        scales.add(scale)
    if not packed:
        raise ModelError(
            f"{where}: quantization_config says mxfp4, and no tensor is in MXFP4 (NAME{_BLOCKS}); "
            "remove quantization_config from config.json if the weights are floating-point"
        )
    rest = {name: tensor for name, tensor in stored.items() if name not in scales}
    for name, weight in packed.items():
        rest[name] = replace(weight.blocks, shape=weight.shape, dtype=torch.bfloat16)
    note = f"{len(packed)} weights are in MXFP4: dequantized to bfloat16 when they are read"
    return rest, packed, [note]


def _checked(
    where: Path, name: str, blocks: StoredTensor, scales: StoredTensor
) -> BlockScaledTensor:
    if (
        {blocks.dtype, scales.dtype} != {torch.uint8}
        or len(scales.shape) != 3
        or blocks.shape != (*scales.shape, _BLOCK // 2)
    ):
        raise CheckpointError(
            f"{where}: {name} {blocks.shape} {blocks.dtype} and its scales {scales.shape} "
            f"{scales.dtype} do not fit: codes are (E, N, K / 32, 16) and scales (E, N, K / 32), "
            "both uint8; download the model again"
        )
    return BlockScaledTensor(blocks, scales)
