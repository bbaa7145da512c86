"""Ladders of recipes: each rung adds one part to the one before.

"atom" is the ablation of the paper and its poster; "quatom" goes on from the whole Atom recipe;
"keys" leaves all but the KV cache in floating point and shows what INT4 keys alone cost;
"parts" quantizes some operands of the Quatom recipe and leaves the others in floating point;
"activations" compares formats and scales of W4A8; "prior-work" holds published methods beside
Atom's and Quatom's recipes.

Source: Atom (Zhao et al., MLSys 2024), accuracy ablation.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quatom.presets import PRESETS
from quatom.recipe import (
    ActivationSpec,
    KVSpec,
    NearestSpec,
    OutlierSpec,
    PostRopeKeys,
    Recipe,
    WeightSpec,
)
from quatom.recipe_file import changed
from quatom.recipe_formats import ActivationFormat


def _changed(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    """The recipe with some fields of its parts replaced, nested as in a recipe file."""
    return changed(recipe, parts)


def _atom_ladder() -> dict[str, Recipe]:
    rtn = replace(PRESETS["rtn-w4a4"], name="rtn")
    fp16 = replace(rtn, outliers=OutlierSpec(format="float16"))
    int8 = replace(rtn, outliers=OutlierSpec())
    groups = replace(
        int8,
        weights=WeightSpec(rounder=NearestSpec(), rows_per_scale=2),
        activations=ActivationSpec(),
    )
    clipping = _changed(groups, weights={"clip_ratio": 0.85}, activations={"clip_ratio": 0.9})
    gptq = _changed(clipping, weights={"rounder": {"method": "gptq"}})
    return {
        "rtn": rtn,
        "outliers_fp16": fp16,
        "outliers_int8": int8,
        "groups": groups,
        "clipping": clipping,
        "gptq": gptq,
        "kv4": replace(gptq, kv_cache=KVSpec()),
    }


def _quatom_ladder() -> dict[str, Recipe]:
    atom = PRESETS["atom-w4a4kv4"]
    rotation = replace(atom, activations=ActivationSpec(rotation="hadamard"))
    keys = replace(rotation, kv_cache=KVSpec(keys=PostRopeKeys(rotation="hadamard")))
    values = _changed(keys, kv_cache={"value_rotation": "hadamard"})
    weights = _changed(values, weights={"clip_ratio": 1.0, "clip_search": "mse"})
    clipping = _changed(weights, activations={"clip_ratio": 0.95})
    offset = _changed(clipping, kv_cache={"keys": {"offset": "mean"}})
    scaling = _changed(offset, kv_cache={"key_scaling": "balanced"})
    weight_multiples = _changed(scaling, weights={"scale_format": "multiples"})
    multiples = _changed(weight_multiples, activations={"scale_format": "multiples"})
    rows = {"rows_per_scale": 1, "scale_format": "packed_multiples"}
    own_scales = _changed(multiples, weights=rows)
    narrow = _changed(own_scales, activations={"clip_ratio": 0.85})
    weighted_offset = _changed(narrow, kv_cache={"keys": {"offset": "weighted"}})
    weighted = _changed(weighted_offset, kv_cache={"key_scaling": "weighted"})
    half = _changed(weighted, channel_scaling={"method": "balanced", "strength": 0.5})
    descent = _changed(half, weights={"rounder": {"descent_sweeps": 3}})
    searched = _changed(scaling, weights={"clip_search": "output"})
    float_target = _changed(clipping, weights={"rounder": {"float_target": 1.0}})
    important_first = {"rounder": {"column_order": "important_first"}}
    return {
        "atom": atom,
        "group_rotation": rotation,
        "rotated_keys": keys,
        "rotated_values": values,
        "searched_weights": weights,
        "activation_clipping": clipping,
        "key_offset": offset,
        "key_scaling": scaling,
        "weight_multiples": weight_multiples,
        "multiples": multiples,
        "own_scales": own_scales,
        "narrow_activations": narrow,
        "weighted_key_offset": weighted_offset,
        "weighted_keys": weighted,
        "half_balance": half,
        "coordinate_descent": descent,
        "whole_balance": _changed(descent, channel_scaling={"strength": 1.0}),
        "narrower_activations": _changed(descent, activations={"clip_ratio": 0.8}),
        "descent_output_search": _changed(descent, weights={"clip_search": "output"}),
        "key_scaling_output_search": searched,
        "key_scaling_output_search_columns": _changed(searched, weights=important_first),
        "output_weighted_search": _changed(clipping, weights={"clip_search": "output"}),
        "important_columns_first": _changed(clipping, weights=important_first),
        "float_input_target": float_target,
        "half_float_input_target": _changed(clipping, weights={"rounder": {"float_target": 0.5}}),
    }


def _keys_ladder() -> dict[str, Recipe]:
    original = replace(PRESETS["fp16"], kv_cache=KVSpec())
    rotated = replace(original, kv_cache=KVSpec(keys=PostRopeKeys(rotation="hadamard")))
    offset = _changed(rotated, kv_cache={"keys": {"offset": "mean"}})
    return {
        "kv4_alone": original,
        "kv4_rotated": rotated,
        "kv4_offset": offset,
        "kv4_scaling": _changed(offset, kv_cache={"key_scaling": "balanced"}),
        "kv4_weighted_offset": _changed(rotated, kv_cache={"keys": {"offset": "weighted"}}),
        "kv4_weighted": _changed(
            rotated, kv_cache={"keys": {"offset": "weighted"}, "key_scaling": "weighted"}
        ),
    }


def _parts_ladder() -> dict[str, Recipe]:
    whole = PRESETS["quatom-w4a4kv4"]
    float_inputs = replace(whole, activations=ActivationSpec(format="float16"))
    float_cache = replace(whole, kv_cache=KVSpec(format="float16"))
    return {
        "cache_alone": replace(PRESETS["fp16"], kv_cache=whole.kv_cache),
        "weights_alone": replace(float_inputs, kv_cache=float_cache.kv_cache),
        "weights_and_cache": float_inputs,
        "weights_and_activations": float_cache,
        "int8_activations": PRESETS["quatom-w4a8kv4"],
        "int8_cache": _changed(whole, kv_cache={"format": "int8"}),
        "all_parts": whole,
    }


def _activations_ladder() -> dict[str, Recipe]:
    def rung(form: ActivationFormat, group_size: int, *, rotated: bool = True) -> Recipe:
        activations = ActivationSpec(
            format=form, group_size=group_size, rotation="hadamard" if rotated else "none"
        )
        return replace(free_scales, activations=activations)

    preset = PRESETS["quatom-w4a8kv4"]
    free_scales = _changed(preset, weights={"scale_format": "float16"})
    return {
        "e4m3_scale_a_group": rung("e4m3", 128),
        "e4m3_scale_a_token": rung("e4m3", -1),
        "int8_scale_a_group": rung("int8", 128),
        "int8_scale_a_token": rung("int8", -1),
        "int8_scale_a_token_multiples": preset,
        "unrotated_e4m3_scale_a_group": rung("e4m3", 128, rotated=False),
        "unrotated_e4m3_scale_a_token": rung("e4m3", -1, rotated=False),
    }


def _prior_work_ladder() -> dict[str, Recipe]:
    smoothed = {
        f"smoothquant_w4a4_{round(100 * alpha)}": _changed(
            PRESETS["smoothquant-w4a4"], channel_scaling={"strength": alpha}
        )
        for alpha in (0.4, 0.6, 0.7, 0.85)
    }
    split = {"qllm_untuned": replace(PRESETS["qllm-w4a4kv4"], tuning=None)}
    names = (
        *("w8a8", "smoothquant-w8a8", "gptq-w4a16", "awq-w4a16", "quip-w4a16", "w4a16"),
        *("omniquant-w4a16", "rtn-w4a4", "smoothquant-w4a4", "omniquant-w4a4kv4", "qllm-w4a4kv4"),
        *("atom-w4a4kv4", "quatom-w4a4kv4", "quatom-w4a4kv4-tuned"),
        *("atom-w4a8kv4", "quatom-w4a8kv4", "quatom-w4a8kv4-tuned"),
    )
    return {name.replace("-", "_"): PRESETS[name] for name in names} | smoothed | split


LADDERS: Mapping[str, Mapping[str, Recipe]] = {
    "atom": _atom_ladder(),
    "quatom": _quatom_ladder(),
    "keys": _keys_ladder(),
    "parts": _parts_ladder(),
    "activations": _activations_ladder(),
    "prior-work": _prior_work_ladder(),
}
"""Rungs by name, in order. "coordinate_descent" is the quatom recipe; what follows it are tries: on
top of it, then of "key_scaling", then each beside "activation_clipping". Rungs of "parts",
"activations" and "prior-work" are beside each other; "smoothquant_w4a4_60" migrates with strength
0.60, and "qllm_untuned" splits and merges channels without the correction."""


def formats_of(recipe: Recipe) -> str:
    """Formats of weights, activations and KV cache, as tables of methods show them."""
    parts = (recipe.weights.format, recipe.activations.format, recipe.kv_cache.format)
    return " / ".join(part.replace("float16", "16") for part in parts)
