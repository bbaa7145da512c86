"""A Quatom checkpoint as the format `compressed-tensors` says it, for other engines.

That format has one number format per linear, symmetric, with a scale per row or per group of equal
size, and activations with one scale per token. It has no outlier channels, no channel order, no
rotation of activations and no INT4 KV cache: recipes with these are refused by what cannot be said.

    w4a16          pack-quantized   p.weight_packed int32 (N, K / 8), p.weight_scale, p.weight_shape
    w8a8, w8a16    int-quantized    p.weight int8 (N, K), p.weight_scale

Source: https://github.com/vllm-project/compressed-tensors
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.arguments import checked
from quatom.checkpoint.codec import decode
from quatom.checkpoint.reader import TensorSource, open_source
from quatom.checkpoint.safetensors_file import write_tensors
from quatom.checkpoint.schema import linear_tensors, outer_tensors
from quatom.checkpoint.writer import check_target
from quatom.errors import CheckpointError, RecipeError
from quatom.numerics.packing import pack_bits
from quatom.numerics.rotary import head_order
from quatom.plan import LayerPlan, LinearPlan, ModelPlan, SitePlan, plan
from quatom.recipe import Recipe


@checked(but=("checkpoint",))
def export_compressed_tensors(checkpoint: str | Path, target: str | Path) -> Path:
    """Write a checkpoint in the format compressed-tensors.

    Args:
        checkpoint: A Quatom checkpoint.
        target: Folder to write; it must not exist.

    Returns:
        `target`.

    Raises:
        ArgumentError: `target` is no path.
        CheckpointError: the checkpoint is damaged or none of ours, or the target exists.
        RecipeError: the format cannot say the recipe.
    """
    target = check_target(target)
    source = open_source(checkpoint)
    if source.recipe is None:
        raise CheckpointError(f"{checkpoint} is no Quatom checkpoint: there is nothing to convert")
    resolved = plan(source.model_config, source.recipe)
    if unsaid := _unsaid(resolved):
        raise RecipeError(
            f"compressed-tensors cannot say {', '.join(unsaid)} of recipe {source.recipe.name}; it "
            "can say w4a16 and w8a8"
        )
    work = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        _write(source, resolved, work)
        os.replace(work, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _unsaid(resolved: ModelPlan) -> list[str]:
    """What of the recipe the format cannot say, in words."""
    recipe = resolved.recipe
    weights, activations = recipe.weights, recipe.activations
    found = {
        f"weights.format {weights.format}": weights.format not in ("int4", "int8"),
        f"activations.format {activations.format}": activations.format not in ("int8", "float16"),
        "int8 activations with int4 weights": (weights.format, activations.format)
        == ("int4", "int8"),
        "routed experts": any(layer.spec.experts is not None for layer in resolved.layers),
        "weights that this family's files hold transposed": any(
            spelling.transposed
            for layer in resolved.layers
            for linears in layer.spec.linears.values()
            for linear in linears
            for spelling in linear.spellings
            if linear.experts is None
        ),
        f"outliers.channels {recipe.outliers.channels}": any(
            site.layout.outliers for site in resolved.sites()
        ),
        "overrides": bool(recipe.overrides),
        "incoherence": recipe.incoherence is not None,
        "channel_splitting": recipe.channel_splitting is not None,
        f"weights.groups {weights.groups}": weights.groups != "consecutive",
        f"activations.rotation {activations.rotation}": activations.rotation != "none",
        f"activations.clip_ratio {activations.clip_ratio}": recipe.quantizes_activations
        and activations.clip_ratio != 1.0,
        f"activations.group_size {activations.group_size}": recipe.quantizes_activations
        and any(site.layout.num_normal_groups > 1 for site in resolved.sites())
        and activations.group_size != -1,
        f"kv_cache.format {recipe.kv_cache.format}": recipe.kv_cache.format != "float16",
        f"a last group shorter than weights.group_size {weights.group_size}": any(
            site.layout.normal % site.layout.group_size for site in resolved.sites()
        ),
        "the order of channels of this family's heads": any(
            head_order(a.rope, a.head_dim) is not None or a.rows_by_group
            for a in (layer.spec.attention for layer in resolved.layers)
        ),
    }
    return [words for words, is_so in found.items() if is_so]


def _write(source: TensorSource, resolved: ModelPlan, folder: Path) -> None:
    config = resolved.config
    outer = {name: source.load(name) for name in outer_tensors(config)}
    files: dict[str, str] = {}
    total = 0
    for number in range(config.num_layers + 1):
        tensors = outer if number == 0 else _layer(source, resolved.layers[number - 1])
        name = f"model-{number + 1:05d}-of-{config.num_layers + 1:05d}.safetensors"
        with (folder / name).open("wb") as stream:
            shapes = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
            write_tensors(stream, shapes, tensors.__getitem__)
        files |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.itemsize for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)
    kept = {k: v for k, v in source.config_dict.items() if k != "attn_implementation"}
    _write_json(
        folder / "config.json", kept | {"quantization_config": _quantization(resolved.recipe)}
    )
    for file in source.folder.iterdir():
        ours = file.name in ("config.json", "quatom_report.json", "model.safetensors.index.json")
        if file.is_file() and not ours and file.suffix != ".safetensors":
            shutil.copy(file, folder)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _layer(source: TensorSource, layer: LayerPlan) -> dict[str, Tensor]:
    """The tensors of a layer; what is not quantized stays as it is."""
    quantized: dict[str, Tensor] = {}
    stored: set[str] = set()
    for site in layer.sites.values():
        names = [n for linear in site.linears for n in linear_tensors(site, linear)]
        tensors = {name: source.load(name) for name in names}
        codes = decode(layer, site, tensors)
        stored.update(names)
        for linear in site.linears:
            own = linear.row_range
            quantized |= _linear(site, linear, codes.values[own], codes.scales[own])
            if linear.bias:
                quantized[f"{linear.name}.bias"] = tensors[f"{linear.name}.bias"]
    rest = [n for n in source.names() if n.startswith(layer.prefix) and n not in stored]
    return quantized | {name: source.load(name) for name in rest}


def _linear(
    site: SitePlan,
    linear: LinearPlan,
    values: Tensor,  # (N, K) codes
    scales: Tensor,  # (N, G) float16
) -> dict[str, Tensor]:
    name = linear.name
    if site.weights.format == "int8":
        return {f"{name}.weight": values.to(torch.int8), f"{name}.weight_scale": scales}
    return {
        # Codes plus 8, eight of a row in a 32-bit word, the first in its lowest bits.
        f"{name}.weight_packed": pack_bits((values + 8).to(torch.uint8), 4).view(torch.int32),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(values.shape, dtype=torch.int64),
    }


def _quantization(recipe: Recipe) -> dict[str, Any]:
    weights = recipe.weights
    grouped = weights.group_size != -1
    is_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if weights.format == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "input_activations": is_token | {"dynamic": True}
                if recipe.quantizes_activations
                else None,
                "weights": {
                    "num_bits": weights.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if grouped else "channel",
                    "group_size": weights.group_size if grouped else None,
                    "dynamic": False,
                },
            }
        },
    }
