"""`quatom import`: codes and scales of GPTQ, AWQ and compressed-tensors checkpoints as they are."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quatom.checkpoint.codec import decode
from quatom.checkpoint.compressed_tensors import export_compressed_tensors
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.schema import linear_tensors
from quatom.cli.main import app
from quatom.errors import CheckpointError, ModelError, RecipeError
from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from quatom.numerics.groups import dequantize_groups
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.importing import import_checkpoint
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec, NearestSpec, WeightSpec
from tests.checkpoint.packed_models import (
    awq_folders,
    gptq_folders,
    random_grid,
    write_folders,
)
from tests.families.models import save_tiny

LENGTH = 40


def compressed_folders(source, folder, *, bits, strategy, symmetric=True, activations=None):
    """A checkpoint that the package compressed-tensors packed, and what it unpacks from it."""
    group = 128 if strategy == "group" else None
    arguments = QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    form = "pack-quantized" if activations is None else "int-quantized"
    compressor = BaseCompressor.get_value_from_registry(form)

    def store(name, weight):
        made = random_grid(
            name, tuple(weight.shape), bits=bits, group=group or -1, symmetric=symmetric
        )
        state = {
            "weight": made.weight,
            # Scales have the dtype of the model: bfloat16, as most are.
            "weight_scale": torch.from_numpy(made.scales).bfloat16(),
            "weight_zero_point": torch.from_numpy(made.zeros - (1 << (bits - 1))).to(torch.int8),
        }
        packed = compressor.compress(state, scheme)
        real = compressor.decompress(dict(packed), scheme)["weight"]
        # It multiplies in bfloat16: the same with a float32 scale is exact.
        wide = packed | {"weight_scale": packed["weight_scale"].float()}
        return packed, compressor.decompress(wide, scheme)["weight"].float() + 0 * real.float()

    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments.model_dump(),
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }
    return write_folders(source, folder, quantization, store)


TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

MAKERS = {
    "gptq-v1": lambda s, f: gptq_folders(s, f),
    "gptq-v2": lambda s, f: gptq_folders(s, f, version="gptq_v2"),
    "gptq-w8": lambda s, f: gptq_folders(s, f, bits=8),
    "gptq-channel": lambda s, f: gptq_folders(s, f, group=-1),
    "gptq-group-32": lambda s, f: gptq_folders(s, f, group=32),
    "gptq-asymmetric": lambda s, f: gptq_folders(s, f, symmetric=False),
    "gptq-v2-asymmetric": lambda s, f: gptq_folders(s, f, version="gptq_v2", symmetric=False),
    "gptq-act-order": lambda s, f: gptq_folders(s, f, group=32, act_order=True),
    "gptq-act-order-asymmetric": lambda s, f: gptq_folders(s, f, act_order=True, symmetric=False),
    "awq": lambda s, f: awq_folders(s, f),
    "awq-64": lambda s, f: awq_folders(s, f, group=64),
    "pack-w4": lambda s, f: compressed_folders(s, f, bits=4, strategy="group"),
    "pack-w4-asymmetric": lambda s, f: compressed_folders(
        s, f, bits=4, strategy="group", symmetric=False
    ),
    "pack-w4-channel": lambda s, f: compressed_folders(s, f, bits=4, strategy="channel"),
    "pack-w8": lambda s, f: compressed_folders(s, f, bits=8, strategy="channel"),
    "int-w8a8": lambda s, f: compressed_folders(
        s, f, bits=8, strategy="channel", activations=TOKEN_INT8
    ),
    "int-w4a8-asymmetric": lambda s, f: compressed_folders(
        s, f, bits=4, strategy="group", symmetric=False, activations=TOKEN_INT8
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llama_dir):
    """Quantized source, the same in floating point, and what was imported, made once."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            packed, plain = MAKERS[case](tiny_llama_dir, folder)
            import_checkpoint(packed, folder / "imported")
            made[case] = packed, plain, folder / "imported"
        return made[case]

    return make


def random_tokens():
    return torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))


def logits(folder):
    loaded = load(folder)
    tokens = random_tokens()
    cache = loaded.model.allocate_kv_cache(-(-LENGTH // 16), 16)
    context = full_sequences_context(1, LENGTH, 16, loaded.device)
    return loaded.model.compute_logits(loaded.model(tokens, context, cache))


@pytest.mark.parametrize("case", MAKERS)
def test_dequantized_weights_are_those_of_the_judge(case, folders):
    _, plain, imported = folders(case)
    source, real = open_source(imported), load_file(plain / "model.safetensors")
    order_of_down = {}
    for layer in plan(source.model_config, source.recipe).layers:
        for site in reversed(layer.sites.values()):
            names = [n for linear in site.linears for n in linear_tensors(site, linear)]
            codes = decode(layer, site, {name: source.load(name) for name in names})
            got = dequantize_groups(codes.values, codes.scales, site.layout)
            want = torch.cat([real[f"{linear.name}.weight"] for linear in site.linears])
            if codes.order is not None:
                want = want[:, codes.order]
            if site.order == "folded":
                # The order is not stored; it is known from one row, whose weights it moves.
                groups = random_grid(
                    site.linears[0].name, tuple(want.shape), group=site.layout.group_size,
                    act_order=True,
                ).groups  # fmt: skip
                order_of_down[layer.index] = torch.from_numpy(groups).argsort(stable=True)
                want = want[:, order_of_down[layer.index]]
            if site.makes and layer.index in order_of_down:
                rows = order_of_down[layer.index]
                want = torch.cat([part[rows] for part in want.split(len(rows))])
            assert torch.equal(got, want), site.title


@pytest.mark.parametrize("case", [case for case in MAKERS if "a8" not in case])
@torch.inference_mode()
def test_logits_are_those_of_the_dequantized_model(case, folders):
    _, plain, imported = folders(case)
    want, got = logits(plain), logits(imported)
    # Equal float32 weights; an order of channels adds up the same K <= 384 products in another
    # order: sqrt(384) * 2**-24 = 1.2e-6 of a sum, in 14 linears one after another.
    assert (got - want).norm() / want.norm() < 2e-5


@pytest.mark.parametrize("case", ["int-w8a8", "int-w4a8-asymmetric"])
@torch.inference_mode()
def test_int8_activations_are_those_of_the_dequantized_model_rounded(case, folders):
    from transformers import AutoModelForCausalLM

    _, plain, imported = folders(case)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x: (rounded_by_token(x[0]),))
    want, got = model(random_tokens()[None]).logits[0], logits(imported)
    # Equal codes give equal results, up to float32 sums; a code on the edge of two moves by one
    # step of 1/127 of its token's largest channel, and what follows by 0.03 at most.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error < 1e-5).float().mean() > 0.2
    assert error.max() < 0.03


def rounded_by_token(x):
    """INT8 with one symmetric float16 scale per token."""
    scales = (x.abs().amax(dim=-1, keepdim=True) / 127).half().float()
    return (x / scales).round().clamp(-128, 127) * scales


@pytest.mark.parametrize("case", ["pack-w4", "int-w8a8", "gptq-v1"])
def test_exported_again_it_is_what_it_was(case, folders, tmp_path):
    packed, _, imported = folders(case)
    target = export_compressed_tensors(imported, tmp_path / "again")
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    got = {}
    for file in set(index.values()):
        got |= load_file(target / file)
    if case == "gptq-v1":
        import_checkpoint(target, tmp_path / "imported")
        first, second = open_source(imported), open_source(tmp_path / "imported")
        assert first.names() == second.names()
        assert all(torch.equal(first.load(name), second.load(name)) for name in first.names())
        return
    want = load_file(packed / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


@pytest.mark.parametrize(
    "family",
    [
        "glm4",  # neighbouring channels of a head turn: rows of q and k move
        "phi3",  # q, k and v in one tensor
        "opt",  # biases, no gate
        "mixtral",  # experts, each with an order of its own for its last input
        "qwen3_moe",
        "hy_v3",  # a shared expert whose tensors have another name in files
        "ernie4_5_moe",
    ],
)
@torch.inference_mode()
def test_families_and_experts_with_act_order(family, tmp_path):
    source = save_tiny(tmp_path / "float", family)
    packed, plain = gptq_folders(source, tmp_path, group=32, act_order=True)
    import_checkpoint(packed, tmp_path / "imported")
    want, got = logits(plain), logits(tmp_path / "imported")
    # As above; where a sum that moved by 1e-6 sends a token to another expert, its logits differ.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error < 2e-5).float().mean() >= 0.9


def test_recipes_say_what_was_found(folders):
    def recipe(case):
        return open_source(folders(case)[2]).recipe

    assert recipe("gptq-v1").weights.format == "int4"
    assert recipe("gptq-v1").weights.groups == "consecutive"
    assert recipe("awq").weights.format == "int5"
    assert recipe("gptq-act-order").weights.groups == "ordered"
    assert recipe("int-w8a8").activations.format == "int8"
    assert recipe("gptq-v1").name == "gptq-w4a16"


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


GATE = "model.layers.1.mlp.gate_proj"


def _wide_scale(tensors):
    tensors[f"{GATE}.scales"] = tensors[f"{GATE}.scales"].float() * (1 + 2**-20)


def _other_groups(tensors):
    tensors[f"{GATE}.g_idx"] = tensors[f"{GATE}.g_idx"].flip(0)


def _uneven_groups(tensors):
    tensors[f"{GATE}.g_idx"] = torch.zeros_like(tensors[f"{GATE}.g_idx"])


def _float_linear(tensors):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{GATE}.{part}"]
    tensors[f"{GATE}.weight"] = torch.zeros(384, 256)


def _packed_head(tensors):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"lm_head.{part}"] = tensors[f"{GATE}.{part}"].clone()
    tensors["lm_head.qweight"] = torch.zeros(32, 320, dtype=torch.int32)
    tensors["lm_head.scales"] = torch.ones(2, 320, dtype=torch.float16)
    del tensors["lm_head.weight"]


def _short(tensors):
    tensors[f"{GATE}.scales"] = tensors[f"{GATE}.scales"][:1].contiguous()


def _real_bias(tensors):
    tensors[f"{GATE}.bias"] = torch.ones(384)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, RecipeError, "GPTQ: bits 3 cannot be imported"),
        ({"checkpoint_format": "marlin"}, RecipeError, "checkpoint_format 'marlin'"),
        ({"dynamic": {"down": {"bits": 8}}}, RecipeError, "1 linears with settings of their own"),
        ({"quant_method": "bitsandbytes"}, ModelError, "quant_method 'bitsandbytes'"),
        ({"bits": "4"}, CheckpointError, "bits '4', an integer is needed"),
        ({"group_size": 64}, CheckpointError, r"scales of .* have shape \(256, 2\), .*\(256, 4\)"),
        (_wide_scale, RecipeError, "scales of model.layers.1.mlp.gate_proj .*no float16 numbers"),
        (_other_groups, RecipeError, "layers.1 gate_up: gate_proj, up_proj share an input and gr"),
        (_uneven_groups, CheckpointError, "groups of model.layers.1.mlp.gate_proj are not of 128"),
        (_float_linear, RecipeError, "gate_proj is not quantized .13 linears"),
        (_packed_head, RecipeError, "lm_head is quantized .1 such"),
        (_short, CheckpointError, r"scales of .* have shape \(384, 1\), .* has \(384, 2\)"),
        (_real_bias, CheckpointError, "holds model.layers.1.mlp.gate_proj.bias"),
    ],
)
def test_what_cannot_be_said_is_refused_and_nothing_is_left(
    change, error, message, tiny_llama_dir, tmp_path
):
    packed, _ = gptq_folders(tiny_llama_dir, tmp_path)
    change_config(packed, **change) if isinstance(change, dict) else change_tensors(packed, change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        import_checkpoint(packed, tmp_path / "imported")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme num_bits 8 type"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "1 transforms"),
    ],
)
def test_compressed_tensors_that_a_recipe_cannot_say(change, message, tiny_llama_dir, tmp_path):
    packed, _ = compressed_folders(tiny_llama_dir, tmp_path, bits=4, strategy="group")
    change_config(packed, **change)
    with pytest.raises(RecipeError, match=message):
        import_checkpoint(packed, tmp_path / "imported")


def test_static_activations_and_nine_bits_are_refused(tiny_llama_dir, tmp_path):
    static = TOKEN_INT8 | {"strategy": "tensor", "dynamic": False}
    packed, _ = compressed_folders(
        tiny_llama_dir, tmp_path / "a", bits=8, strategy="channel", activations=static
    )
    with pytest.raises(RecipeError, match="input activations num_bits 8 type int strategy tensor"):
        import_checkpoint(packed, tmp_path / "imported")
    packed, _ = compressed_folders(
        tiny_llama_dir, tmp_path / "b", bits=8, strategy="channel", symmetric=False
    )
    with pytest.raises(RecipeError, match=r"8-bit codes with zero points .* take 9 bits"):
        import_checkpoint(packed, tmp_path / "imported")


def test_settings_of_older_tools_and_their_empty_biases_are_read(tiny_llama_dir, tmp_path):
    packed, plain = gptq_folders(tiny_llama_dir, tmp_path)
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    del quantization["quant_method"], quantization["checkpoint_format"]
    (packed / "quantize_config.json").write_text(json.dumps(quantization))
    change_tensors(packed, lambda t: t.update({f"{GATE}.bias": torch.zeros(384)}))
    import_checkpoint(packed, tmp_path / "imported")
    assert torch.equal(logits(tmp_path / "imported"), logits(plain))


def test_the_command(tiny_llama_dir, tmp_path):
    packed, _ = gptq_folders(tiny_llama_dir, tmp_path)
    words = ["import", str(packed), str(tmp_path / "imported")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "gptq-w4a16" in done.output
    with pytest.raises(CheckpointError, match="exists; choose another target"):
        import_checkpoint(packed, tmp_path / "imported")
    with pytest.raises(ModelError, match="reads floating-point models"):
        import_checkpoint(tiny_llama_dir, tmp_path / "other")


def test_groups_of_ordered_channels_can_be_made_too(tiny_llama_dir, text_file, tmp_path):
    """Channels of like magnitude share a scale, although none of them is kept as an outlier."""
    recipe = replace(
        PRESETS["w4a16"],
        weights=WeightSpec(format="int8", groups="ordered", rounder=NearestSpec()),
        calibration=CalibrationSpec(num_samples=2, sequence_length=64),
    )
    quantize_checkpoint(tiny_llama_dir, tmp_path / "ordered", recipe, calibration=text_file)
    source = open_source(tmp_path / "ordered")
    order = source.load("model.layers.0.self_attn.q_proj.order")
    assert order.sort().values.tolist() == list(range(256))
    assert not torch.equal(order, order.sort().values)
    want, got = logits(tiny_llama_dir), logits(tmp_path / "ordered")
    # 8 bits leave 1 / 127 / sqrt(12) = 0.2 % of a group's largest weight, 1 % of a usual one, in
    # each of 14 linears. A wrong order of one of them leaves 100 %.
    assert (got - want).norm() / want.norm() < 0.1
    with pytest.raises(RecipeError, match=r"weights\.groups ordered"):
        export_compressed_tensors(tmp_path / "ordered", tmp_path / "ct")


def test_what_compressed_tensors_cannot_say_is_not_exported(folders, tmp_path):
    with pytest.raises(RecipeError, match=r"weights\.format int5"):
        export_compressed_tensors(folders("awq")[2], tmp_path / "ct")


def test_every_method_that_is_read_is_the_remedy_of_an_error():
    from quatom.checkpoint.packed.source import _READERS
    from quatom.checkpoint.validation import instead_of

    assert all("`quatom import`" in instead_of(method) for method in _READERS)
    assert "import" not in instead_of("bitsandbytes") + instead_of(None)
