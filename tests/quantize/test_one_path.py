"""The packed checkpoint computes what its simulation does: one code path, judged from outside."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from quatom.errors import RecipeError
from quatom.loading import load
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import (
    ActivationSpec,
    CalibrationSpec,
    GPTQSpec,
    KVSpec,
    NearestSpec,
    OutlierSpec,
    PostRopeKeys,
    Recipe,
    ScalingSpec,
    WeightSpec,
)
from tests.conftest import LLAMA, make_model, quick
from tests.families.models import save_tiny
from tests.quantize.simulation import Simulation, run_and_record

CALIBRATION = CalibrationSpec(num_samples=4, sequence_length=32)
GROUPS_OF_32 = dict(
    weights=WeightSpec(group_size=32, rows_per_scale=2, clip_ratio=0.85),
    activations=ActivationSpec(group_size=32, clip_ratio=0.9),
    outliers=OutlierSpec(channels=32),
)
WIDE_SCALES = WeightSpec(group_size=32, rows_per_scale=64)
VARIANTS = {
    "tensor parallel": Recipe(**GROUPS_OF_32, tensor_parallel=2),
    "post-rope keys": Recipe(kv_cache=KVSpec(keys=PostRopeKeys())),
    "offset keys": Recipe(kv_cache=KVSpec(keys=PostRopeKeys(offset="mean"))),
    "scaled keys": Recipe(kv_cache=KVSpec(key_scaling="balanced")),
    "first columns first": Recipe(
        weights=WeightSpec(rounder=GPTQSpec(column_order="important_first"))
    ),
    "int8 cache": Recipe(kv_cache=KVSpec(format="int8")),
    "float16 outliers": Recipe(outliers=OutlierSpec(format="float16")),
    "mean magnitudes": Recipe(outliers=OutlierSpec(metric="abs_mean")),
    "weights alone, with outliers": Recipe(activations=ActivationSpec(format="float16")),
    "wide shared scales": Recipe(**GROUPS_OF_32 | {"weights": WIDE_SCALES}),
    "float targets": Recipe(weights=WeightSpec(rounder=GPTQSpec(float_target=1.0))),
    "rotated tensor parallel": Recipe(
        **GROUPS_OF_32 | {"activations": ActivationSpec(group_size=32, rotation="hadamard")},
        kv_cache=KVSpec(value_rotation="hadamard"),
        tensor_parallel=2,
    ),
    "refined rows": Recipe(
        **GROUPS_OF_32
        | {
            "weights": WeightSpec(
                group_size=32,
                scale_format="packed_multiples",
                rounder=GPTQSpec(descent_sweeps=2),
            ),
            "activations": ActivationSpec(group_size=32, scale_format="multiples"),
        },
        channel_scaling=ScalingSpec(method="balanced"),
        tensor_parallel=2,
    ),
    "searched clipping": Recipe(weights=WeightSpec(clip_search="output", format="int3")),
    **{
        f"int{bits} weights": Recipe(
            weights=WeightSpec(format=f"int{bits}", rounder=NearestSpec()),
            activations=ActivationSpec(format="int8"),
        )
        for bits in (2, 5, 7)
    },
}
TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5))


def agree(source, target, monkeypatch, ties=0.005, backend=None):
    loaded = load(target, backend=backend)
    got, recorded = run_and_record(loaded, TOKENS)
    simulation = Simulation(target, source)
    want = simulation.logits(TOKENS, recorded, monkeypatch)
    # Codes are equal but for ties. What is left is the order of float32 sums, in reordered against
    # original channels: some 1e-7 of the logits for each of a handful of layers. Where inputs and
    # outputs are rotated, each linear rounds its rows four times more, once per Kronecker factor.
    tolerance = 1e-5 if simulation.recipe["incoherence"] is None else 5e-5
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    counts = simulation.counts
    assert counts.differing <= 2 + ties * counts.groups, counts
    # The network is not one in which quantization changes nothing.
    assert (got - plain_logits(source)).abs().max() > 1e-3 * want.abs().max()


@cache
def plain_logits(source):
    return run_and_record(load(source), TOKENS)[0]


def short(recipe):
    return quick(recipe, CALIBRATION)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fp16"])
def test_presets_on_llama(name, tiny_llama_dir, text_file, tmp_path, monkeypatch):
    recipe = short(PRESETS[name])
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    agree(tiny_llama_dir, tmp_path / "q", monkeypatch)


@pytest.mark.parametrize("name", ["quatom-w4a4kv4", "w8a8"])
def test_presets_on_qwen2(name, tiny_qwen2_dir, text_file, tmp_path, monkeypatch):
    recipe = short(PRESETS[name])
    quantize_checkpoint(tiny_qwen2_dir, tmp_path / "q", recipe, calibration=text_file)
    agree(tiny_qwen2_dir, tmp_path / "q", monkeypatch)


@pytest.fixture(scope="module")
def expert_folders(tmp_path_factory):
    names = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss")
    return {name: save_tiny(tmp_path_factory.mktemp("moe") / name, name) for name in names}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        # Weights alone, scaled, in 8 bits, in floating point, and with every transform.
        ("mixtral", "awq-w4a16"),
        ("mixtral", "smoothquant-w4a4"),
        ("mixtral", "w8a8"),
        ("mixtral", "atom-fp4"),
        ("mixtral", "quatom-w4a4kv4"),
        ("qwen2_moe", "quatom-w4a4kv4"),
        ("olmoe", "atom-w4a4kv4"),
        ("gpt_oss", "quatom-w4a4kv4"),
        ("gpt_oss", "w8a8"),
    ],
)
def test_experts(model, name, expert_folders, text_file, tmp_path, monkeypatch):
    source, recipe = expert_folders[model], short(PRESETS[name])
    if model == "olmoe":  # its keys are normed behind k_proj, where the simulation rounds them
        recipe = replace(recipe, kv_cache=KVSpec(format="float16"))
    quantize_checkpoint(source, tmp_path / "q", recipe, calibration=text_file)
    agree(source, tmp_path / "q", monkeypatch)


@pytest.fixture(scope="module")
def one_block_dir(tmp_path_factory):
    """Llama of one block; presets go through two."""
    config = LLAMA | {"num_hidden_layers": 1}
    return make_model(tmp_path_factory.mktemp("models") / "one-block", config, seed=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_recipe_fields(name, one_block_dir, text_file, tmp_path, monkeypatch):
    recipe = short(VARIANTS[name])
    quantize_checkpoint(one_block_dir, tmp_path / "q", recipe, calibration=text_file)
    # Every float16 outlier has ties of its own, 2**-11 apart instead of a sixteenth: more of them.
    ties = 0.03 if recipe.outliers.format == "float16" else 0.005
    agree(one_block_dir, tmp_path / "q", monkeypatch, ties)


def as_version_1(recipe):
    """The parts of a recipe that version 1 spelled in another way."""
    weights, cache = dict(recipe["weights"]), dict(recipe["kv_cache"])
    rounder, keys = weights.pop("rounder"), cache.pop("keys")
    weights |= {"rounding": rounder["method"], "target": "own_input", "target_strength": 1.0}
    weights |= {name: rounder[name] for name in ("damping", "column_order")}
    cache |= {"keys": keys["method"], "rotation": keys["rotation"], "key_offset": keys["offset"]}
    return {
        "format_version": 1,
        "weights": weights,
        "kv_cache": cache,
        "on_singular": rounder["on_singular"],
    }


def test_a_checkpoint_of_format_version_1_loads(tiny_llama_dir, text_file, tmp_path, monkeypatch):
    """Its scales are float16, and its recipe lacks the fields that later versions added."""
    preset = PRESETS["quatom-w4a4kv4"]
    weights = WeightSpec(rows_per_scale=2, clip_search="mse", scale_format="multiples")
    keys = PostRopeKeys(rotation="hadamard", offset="mean")
    cache = replace(preset.kv_cache, keys=keys, key_scaling="balanced")
    recipe = short(replace(Recipe(), weights=weights, kv_cache=cache))
    recipe = replace(recipe, activations=preset.activations)
    quantize_checkpoint(tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    agree(tiny_llama_dir, tmp_path / "q", monkeypatch)
    want, _ = run_and_record(load(tmp_path / "q"), TOKENS)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    stored = config["quantization_config"]["recipe"]
    assert stored["format_version"] == 3
    stored |= as_version_1(stored)
    del stored["channel_scaling"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path / "q")
    assert loaded.recipe == recipe
    assert torch.equal(run_and_record(loaded, TOKENS)[0], want)
    stored["format_version"] = 4
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="format_version 4, this Quatom reads up to 3; upgrade"):
        load(tmp_path / "q")


@pytest.fixture(scope="module")
def biased_llama_dir(tmp_path_factory):
    """Llama with a bias everywhere: those of gate and up follow their permuted rows."""
    config = LLAMA | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
    return make_model(tmp_path_factory.mktemp("models") / "biased", config, seed=3)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_biases_follow_their_rows(
    tensor_parallel, biased_llama_dir, text_file, tmp_path, monkeypatch
):
    recipe = short(Recipe(**GROUPS_OF_32, tensor_parallel=tensor_parallel))
    quantize_checkpoint(biased_llama_dir, tmp_path / "q", recipe, calibration=text_file)
    agree(biased_llama_dir, tmp_path / "q", monkeypatch)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("kv_format", ["int4", "float16"])
def test_the_streamed_block_is_the_loaded_block(
    tensor_parallel, kv_format, tiny_llama_dir, text_file, tmp_path
):
    """Bit by bit: calibration of the next block runs what the checkpoint will run."""
    from quatom.modeling.rotary import RotaryTables
    from quatom.quantize.statistics import run_block

    recipe = Recipe(
        **GROUPS_OF_32,
        kv_cache=KVSpec(format=kv_format),
        tensor_parallel=tensor_parallel,
        calibration=CALIBRATION,
    )
    streamed = []
    quantize_checkpoint(
        tiny_llama_dir,
        tmp_path / "q",
        recipe,
        calibration=text_file,
        on_block=lambda block: streamed.append(block.module),
    )
    loaded = load(tmp_path / "q")
    hidden = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTables(loaded.config, 16)
    for ours, theirs in zip(streamed, loaded.model.blocks, strict=True):
        want = run_block(ours, hidden, rotary)
        assert torch.equal(run_block(theirs, hidden, rotary), want)
        hidden = want


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(tensor_parallel=2), r"o_proj has 256 input channels, 128 in each of 2"),
        (Recipe(**GROUPS_OF_32, tensor_parallel=3), r"o_proj has 256 .* tensor_parallel 3"),
        (Recipe(**GROUPS_OF_32, tensor_parallel=8), r"4 attention heads .* tensor_parallel 8"),
        # 192 rows a block divide by 64, its 160 normal and 32 outlier rows do not.
        (
            Recipe(**GROUPS_OF_32 | {"weights": WIDE_SCALES}, tensor_parallel=2),
            r"160 normal channels and 32 outliers.*rows_per_scale 64",
        ),
        (
            Recipe(**GROUPS_OF_32 | {"weights": WeightSpec(group_size=32, rows_per_scale=3)}),
            r"q_proj has 256 rows, no multiple of weights.rows_per_scale 3",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(recipe, message, tiny_llama_dir, text_file, tmp_path):
    with pytest.raises(RecipeError, match=message):
        quantize_checkpoint(tiny_llama_dir, tmp_path / "q", short(recipe), calibration=text_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "needed"),
    [
        ({"kv_cache": KVSpec(keys=PostRopeKeys(), key_scaling="weighted")}, "key_scaling 'none'"),
        ({"channel_scaling": ScalingSpec(method="balanced")}, "channel_scaling null"),
    ],
)
def test_float_targets_beside_scaled_rows_are_refused_before_work(parts, needed, tmp_path):
    """Outputs of the model as it comes are no targets of rows that are scaled."""
    recipe = replace(VARIANTS["float targets"], calibration=CALIBRATION, **parts)
    folder = make_model(tmp_path / "model", LLAMA)
    with pytest.raises(RecipeError, match=rf"float_target 1.0 .* needs .*{needed}"):
        quantize_checkpoint(folder, tmp_path / "made", recipe, calibration=torch.ones(4, 32).long())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
