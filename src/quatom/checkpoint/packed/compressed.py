"""Linears that llm-compressor wrote in the format compressed-tensors.

    pack-quantized   weight_packed int32 (N, K * bits / 32)     codes along K
                     weight_zero_point int32 (N * bits / 32, G) along N, if asymmetric
                     weight_shape (2,), weight_g_idx (K,) with act-order of groups
    int-quantized    weight int8 (N, K)                         signed codes
                     weight_zero_point int8 (N, G)              if asymmetric
    both             weight_scale float (N, G), or (1,) for the whole tensor

Source: https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quatom.checkpoint.packed.linear import Parts, Scheme, unpack_words
from quatom.checkpoint.packed.settings import integer, refuse
from quatom.checkpoint.safetensors_file import StoredTensor
from quatom.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class Compressed:
    """See `PackedFormat`."""

    scheme: Scheme
    marker: str
    symmetric: bool
    optional: tuple[str, ...] = ("weight_shape", "weight_g_idx", "weight_zero_point")
    group_part: str = "weight_g_idx"

    @property
    def needed(self) -> tuple[str, ...]:
        """See `PackedFormat`."""
        zero = () if self.symmetric else ("weight_zero_point",)
        return (self.marker, "weight_scale", *zero)

    @property
    def _in_words(self) -> bool:
        return self.marker == "weight_packed"

    def shape(self, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = stored[self.marker].shape
        return rows, columns * 32 // self.scheme.bits if self._in_words else columns

    def codes(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        stored = parts(self.marker)
        if self._in_words:
            return unpack_words(stored, self.scheme.bits)
        return stored.to(torch.int16) + self.scheme.middle

    def scales(self, parts: Parts) -> Tensor:
        """See `PackedFormat`."""
        scales = parts("weight_scale")
        return scales.view(1, 1) if scales.numel() == 1 else scales.view(len(scales), -1)

    def zeros(self, parts: Parts) -> Tensor | None:
        """See `PackedFormat`."""
        if self.symmetric:
            return None
        stored = parts("weight_zero_point")
        if stored.dtype != torch.int32:  # signed, as the codes are
            return stored.view(len(stored), -1).to(torch.int16) + self.scheme.middle
        return unpack_words(stored.t(), self.scheme.bits).t().to(torch.int16)


def read_compressed(quantization: Mapping[str, Any]) -> Compressed:
    """The format that a quantization_config says.

    Raises:
        CheckpointError: it is damaged.
        RecipeError: it is one that cannot be imported.
    """
    weights, activations, form = _one_group(quantization)
    bits, strategy = integer(weights, "num_bits"), weights.get("strategy")
    transforms = (quantization.get("transform_config") or {}).get("config_groups")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    refuse(
        "compressed-tensors",
        {
            f"format {form!r}": form not in ("pack-quantized", "int-quantized"),
            f"num_bits {bits} {weights.get('type', 'int')} weights": bits not in (4, 8)
            or weights.get("type", "int") != "int",
            f"strategy {strategy!r} of weights": strategy not in ("channel", "group", "tensor"),
            f"input activations {_short(activations)}": not _is_token_int8(activations),
            f"kv_cache_scheme {_short(quantization.get('kv_cache_scheme'))}": bool(
                quantization.get("kv_cache_scheme")
            ),
            f"sparsity {sparsity!r}": sparsity != "dense",
            f"{len(transforms or ())} transforms (transform_config)": bool(transforms),
        },
        "INT4 and INT8 weights, with activations in floating point or INT8 per token,",
    )
    size = integer(weights, "group_size") if strategy == "group" else -1
    kind: Literal["float16", "int8"] = "int8" if activations else "float16"
    scheme = Scheme("compressed-tensors", bits, size, kind)
    marker = "weight_packed" if form == "pack-quantized" else "weight"
    return Compressed(scheme, marker, bool(weights.get("symmetric", True)))


def _one_group(quantization: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any, Any]:
    """Weights, input activations and format of the only scheme."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            "quantization_config of compressed-tensors has no config_groups; download the "
            "checkpoint again"
        )
    schemes = []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ModelError(
                "quantization_config has a group without weights, which quantizes activations "
                "alone: that cannot be imported"
            )
        form = group.get("format") or quantization.get("format")
        scheme = group["weights"], group.get("input_activations"), form
        if scheme not in schemes:
            schemes.append(scheme)
        outputs = group.get("output_activations")
        refuse(
            "compressed-tensors",
            {f"output activations {_short(outputs)}": bool(outputs)},
            "inputs of linears",
        )
    refuse(
        "compressed-tensors",
        {f"{len(schemes)} schemes in one model (config_groups)": len(schemes) > 1},
        "one scheme",
    )
    return schemes[0]


def _is_token_int8(activations: Any) -> bool:
    """Whether activations are left alone, or in INT8 with a symmetric scale found per token."""
    if not activations:
        return True
    return (
        isinstance(activations, Mapping)
        and {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "dynamic": True,
            "strategy": "token",
        }.items()
        <= ({"type": "int", "symmetric": True} | dict(activations)).items()
    )


def _short(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return repr(settings)
    names = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    return " ".join(f"{name} {settings[name]}" for name in names if name in settings)
