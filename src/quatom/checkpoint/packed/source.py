"""Open a checkpoint of another quantizer: codes as a model's weights, and linear by linear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quatom.checkpoint.configuration import as_model_config
from quatom.checkpoint.expert_tensors import Parts, other_parts
from quatom.checkpoint.folder_source import Readable, open_safetensors
from quatom.checkpoint.packed.awq import read_awq
from quatom.checkpoint.packed.compressed import read_compressed
from quatom.checkpoint.packed.gptq import read_gptq
from quatom.checkpoint.packed.linear import PackedFormat, PackedLinear
from quatom.checkpoint.reader import find_model
from quatom.checkpoint.safetensors_file import StoredTensor, read_tensor
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.checkpoint.tensor_source import TensorSource
from quatom.checkpoint.validation import PACKED_METHODS, read_json
from quatom.errors import CheckpointError, ModelError, RecipeError
from quatom.plan import LayerPlan, LinearPlan, plan
from quatom.presets import PRESETS

_READERS: dict[str, Callable[[Mapping[str, Any]], PackedFormat]] = dict(
    zip(PACKED_METHODS, (read_gptq, read_awq, read_compressed), strict=True)
)
_OLDER = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
"""Files that tools wrote before config.json had quantization_config."""


@dataclass(frozen=True, slots=True)
class PackedSource:
    """A quantized model."""

    source: TensorSource
    """The model with weights of linears in units of their scales: integers as float32."""
    form: PackedFormat
    linears: Mapping[str, PackedLinear]
    """By the prefix of their tensors."""

    def parts(self, layer: LayerPlan, linear: LinearPlan) -> tuple[tuple[PackedLinear, ...], ...]:
        """The stored linears whose rows, one after another, are those of each expert, or of one.

        Raises:
            RecipeError: it is not quantized.
        """
        spellings: list[Parts] = [((linear.name,),), *other_parts(layer, linear)]
        for spelling in spellings:
            if all(name in self.linears for names in spelling for name in names):
                return tuple(tuple(self.linears[name] for name in names) for names in spelling)
        raise RecipeError(
            f"{linear.name} is not quantized ({len(self.linears)} linears of the model are): a "
            "recipe quantizes every linear of every layer alike"
        )


def open_packed(path_or_id: str | Path) -> PackedSource:
    """Open a checkpoint of GPTQ, AWQ or llm-compressor. Headers are read and checked.

    Raises:
        CheckpointError: nothing is there, or files are missing, damaged or do not fit config.json.
        ModelError: it is none of these, or the architecture is not supported.
        RecipeError: it is quantized in a way that cannot be imported.
    """
    folder = find_model(path_or_id)
    if not folder.is_dir() or not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is no folder with a config.json: nothing can be imported")
    try:
        form = _form(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    config = as_model_config(folder / "config.json", read_json(folder / "config.json"))
    known = checkpoint_tensors(plan(config, PRESETS["fp16"]))
    linears: dict[str, PackedLinear] = {}

    def convert(
        where: Path, stored: Mapping[str, StoredTensor], _: Mapping[str, Any]
    ) -> tuple[dict[str, StoredTensor], Mapping[str, Readable], list[str]]:
        linears.update(_linears(where, form, stored))
        used = {f"{name}.{part}" for name, one in linears.items() for part in one.stored}
        rest = {name: tensor for name, tensor in stored.items() if name not in used}
        made = {f"{name}.weight": one for name, one in linears.items()}
        rest |= {name: one.header for name, one in made.items()}
        notes = [f"{len(linears)} linears of {form.scheme.method}, {form.scheme.bits} bits"]
        for name in [f"{n}.bias" for n in linears if f"{n}.bias" not in known]:
            if name in rest and not bool(torch.count_nonzero(read_tensor(rest[name]))):
                del rest[name]  # some tools store zeros where the model has no bias
        return rest, made, notes

    source = open_safetensors(folder, lambda *_: None, convert)
    return PackedSource(source, form, linears)


def _form(folder: Path) -> PackedFormat:
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or config.get("compression_config")
    for older, file in _OLDER.items():
        if quantization is None and (folder / file).exists():
            quantization = read_json(folder / file) | {"quant_method": older}
    method: Any = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in _READERS:
        raise ModelError(
            f"{folder} has quantization_config.quant_method {method!r}: {', '.join(_READERS)} can "
            "be imported; `quatom quantize` reads floating-point models"
        )
    assert isinstance(quantization, Mapping)
    return _READERS[method](quantization)


def _linears(
    where: Path, form: PackedFormat, stored: Mapping[str, StoredTensor]
) -> dict[str, PackedLinear]:
    found: dict[str, PackedLinear] = {}
    end = f".{form.marker}"
    for name in stored:
        prefix = name.removesuffix(end)
        if not name.endswith(end) or stored[name].dtype.is_floating_point:
            continue
        if missing := [part for part in form.needed if f"{prefix}.{part}" not in stored]:
            raise CheckpointError(
                f"{where} has {name} and lacks {prefix}.{missing[0]}; download it again"
            )
        parts = {
            part: stored[f"{prefix}.{part}"]
            for part in (*form.needed, *form.optional)
            if f"{prefix}.{part}" in stored
        }
        codes, wanted = stored[name], torch.int8 if form.marker == "weight" else torch.int32
        if len(codes.shape) != 2 or codes.dtype != wanted:
            raise CheckpointError(
                f"{where}: {name} is {codes.shape} {codes.dtype}, a matrix of {wanted} is needed"
            )
        found[prefix] = PackedLinear(prefix, form, parts)
    if not found:
        raise CheckpointError(
            f"{where} has no tensor {form.marker}, although quantization_config says "
            f"{form.scheme.method}; configuration and weights do not belong together"
        )
    return found
