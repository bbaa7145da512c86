"""The named recipes."""

from dataclasses import replace

from quatom.recipe import (
    ActivationSpec,
    GPTQSpec,
    IncoherenceSpec,
    KVSpec,
    NearestSpec,
    OutlierSpec,
    PostRopeKeys,
    Recipe,
    ScalingSpec,
    SplittingSpec,
    WeightSpec,
)
from quatom.recipe_tuning import LowRankSpec, OmniQuantSpec, TuningSpec


def _presets() -> dict[str, Recipe]:
    nearest, important_first = NearestSpec(), GPTQSpec(column_order="important_first")
    no_outliers = OutlierSpec(channels=0)
    float_activations = ActivationSpec(format="float16")
    float_cache = KVSpec(format="float16")
    atom_weights = WeightSpec(rows_per_scale=2, clip_ratio=0.85)
    searched_weights = WeightSpec(
        clip_search="mse",
        scale_format="packed_multiples",
        rounder=GPTQSpec(descent_sweeps=3),
    )
    rotated_cache = KVSpec(
        keys=PostRopeKeys(rotation="hadamard", offset="weighted"),
        key_scaling="weighted",
        value_rotation="hadamard",
    )
    half_balance = ScalingSpec(method="balanced", strength=0.5)
    recipes = (
        Recipe(
            name="fp16",
            weights=WeightSpec(format="float16", rounder=nearest),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
        ),
        Recipe(
            name="w8a8",
            weights=WeightSpec(format="int8", group_size=-1, rounder=nearest),
            activations=ActivationSpec(format="int8", group_size=-1),
            kv_cache=float_cache,
            outliers=no_outliers,
        ),
        Recipe(
            name="w4a16",
            weights=WeightSpec(clip_search="mse", rounder=important_first),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
        ),
        Recipe(
            name="gptq-w4a16",
            weights=WeightSpec(rounder=important_first),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
        ),
        Recipe(
            name="awq-w4a16",
            weights=WeightSpec(rounder=nearest, clip_search="group_output"),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
            channel_scaling=ScalingSpec(method="awq", strength=1.0),
        ),
        Recipe(
            name="quip-w4a16",
            weights=WeightSpec(format="odd4", group_size=-1, clip_search="mse"),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
            channel_scaling=ScalingSpec(method="balanced", strength=1.0),
            incoherence=IncoherenceSpec(),
        ),
        Recipe(
            name="smoothquant-w8a8",
            weights=WeightSpec(format="int8", group_size=-1, rounder=nearest),
            activations=ActivationSpec(format="int8", group_size=-1),
            kv_cache=float_cache,
            outliers=no_outliers,
            channel_scaling=ScalingSpec(method="smoothquant"),
        ),
        Recipe(
            name="smoothquant-w4a4",
            weights=WeightSpec(group_size=-1, rounder=nearest),
            activations=ActivationSpec(group_size=-1),
            kv_cache=float_cache,
            outliers=no_outliers,
            channel_scaling=ScalingSpec(method="smoothquant"),
        ),
        Recipe(
            name="omniquant-w4a16",
            weights=WeightSpec(rounder=nearest),
            activations=float_activations,
            kv_cache=float_cache,
            outliers=no_outliers,
            tuning=OmniQuantSpec(factor_rate=0.0),
        ),
        Recipe(
            name="omniquant-w4a4kv4",
            weights=WeightSpec(group_size=-1, rounder=nearest),
            activations=ActivationSpec(group_size=-1),
            kv_cache=KVSpec(keys=PostRopeKeys()),
            outliers=no_outliers,
            channel_scaling=ScalingSpec(method="smoothquant"),
            tuning=OmniQuantSpec(),
        ),
        Recipe(
            name="qllm-w4a4kv4",
            weights=WeightSpec(group_size=-1, rounder=nearest),
            activations=ActivationSpec(group_size=-1),
            kv_cache=KVSpec(keys=PostRopeKeys()),
            outliers=no_outliers,
            channel_splitting=SplittingSpec(),
            tuning=LowRankSpec(),
        ),
        Recipe(
            name="rtn-w4a4",
            weights=WeightSpec(group_size=-1, rounder=nearest),
            activations=ActivationSpec(group_size=-1),
            kv_cache=float_cache,
            outliers=no_outliers,
        ),
        Recipe(
            name="atom-w4a4kv4",
            weights=atom_weights,
            activations=ActivationSpec(clip_ratio=0.9),
        ),
        Recipe(
            name="atom-w4a8kv4",
            weights=atom_weights,
            activations=ActivationSpec(format="e4m3"),
        ),
        Recipe(
            name="atom-fp4",
            weights=WeightSpec(format="e2m1", rows_per_scale=2, clip_ratio=0.85),
            activations=ActivationSpec(format="e2m1"),
        ),
        Recipe(
            name="atom-w3a3",
            weights=WeightSpec(format="int3", rows_per_scale=2, clip_ratio=0.85),
            activations=ActivationSpec(format="int3", clip_ratio=0.9),
        ),
        Recipe(
            name="quatom-w4a4kv4",
            weights=searched_weights,
            activations=ActivationSpec(
                clip_ratio=0.85, scale_format="multiples", rotation="hadamard"
            ),
            kv_cache=rotated_cache,
            channel_scaling=half_balance,
        ),
        Recipe(
            name="quatom-w4a8kv4",
            weights=searched_weights,
            activations=ActivationSpec(format="int8", group_size=-1, rotation="hadamard"),
            kv_cache=rotated_cache,
            channel_scaling=half_balance,
        ),
    )
    named = {recipe.name: recipe for recipe in recipes}
    for bits in ("w4a4kv4", "w4a8kv4"):
        name = f"quatom-{bits}-tuned"
        named[name] = replace(named[f"quatom-{bits}"], name=name, tuning=TuningSpec())
    return named


PRESETS: dict[str, Recipe] = _presets()
"""Recipes by name; each is a row of the accuracy and throughput tables in the docs."""

DEFAULT_RECIPE = "quatom-w4a8kv4"
"""The preset that the command line and `quantize_checkpoint` take when none is named."""
