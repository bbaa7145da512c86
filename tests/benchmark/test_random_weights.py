"""Random models: the public sizes, every preset runs, and weights take the bytes they should."""

from dataclasses import replace
from math import prod

import pytest
import torch

from quatom.benchmark.model_shapes import SHAPES, find_shape
from quatom.benchmark.random_weights import (
    STD,
    random_model,
    root_mean_square,
    weight_bytes,
)
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.engine.config import EngineConfig
from quatom.engine.llm import LLM, Engine, SamplingParams
from quatom.errors import ModelError, RecipeError
from quatom.families.registry import read_config
from quatom.modeling.context import full_sequences_context
from quatom.numerics.formats import get_format
from quatom.ops.backend import Backend
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import OutlierSpec

TINY = find_shape("tiny")
FLOAT = PRESETS["fp16"]
LINEAR_WEIGHTS = plan(TINY, FLOAT).num_weights


def parameters(config):
    return sum(prod(spec.shape) for spec in checkpoint_tensors(plan(config, FLOAT)).values())


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as the model cards of the public checkpoints count them
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_shapes_have_the_public_number_of_parameters(name, count):
    assert parameters(find_shape(name)) == count


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_generates(name):
    loaded = random_model("tiny", PRESETS[name], device="cpu")
    model = loaded.model
    context = full_sequences_context(2, 40, 32, loaded.device)
    ids = torch.randint(512, (80,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model(ids, context, model.allocate_kv_cache(4, 32))
        logits = model.compute_logits(hidden)
        scores = model.head_logits(hidden)
    assert logits.shape == (80, 512)
    assert logits.dtype is torch.float32
    assert torch.equal(scores.float(), logits)
    assert torch.isfinite(logits).all()
    # Hidden states leave the final norm with unit root mean square: 16 = sqrt(hidden) of STD each.
    assert 0.5 < logits.std() / (16 * STD) < 2.0
    engine = Engine(loaded, EngineConfig(max_num_seqs=4, max_num_batched_tokens=256))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    outputs = LLM.from_engine(engine).generate([[1, 2, 3], [4] * 70], params)
    assert [len(output.token_ids) for output in outputs] == [5, 5]


@pytest.mark.parametrize("name", ["atom-w4a4kv4", "quatom-w4a8kv4", "w4a16", "w8a8", "atom-fp4"])
def test_weights_have_the_standard_deviation_of_llama(name):
    loaded = random_model("tiny", PRESETS[name], device="cpu", backend=Backend.REFERENCE)
    for block in loaded.model.blocks:
        for site in block.plan.sites:
            (weight,) = block.linears[site].prepared.tensors
            assert weight.std().item() == pytest.approx(STD, rel=0.05)
            assert abs(weight.mean().item()) < STD / 50


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w8a8", 8), ("w4a16", 4), ("rtn-w4a4", 4), ("atom-w4a4kv4", 4), ("quatom-w4a8kv4", 4)],
)
def test_packed_weights_take_the_bytes_of_their_codes(name, bits):
    """The portable backend's layout: codes of whole blocks, int8 outliers, float32 scales."""
    recipe = PRESETS[name]
    loaded = random_model("tiny", recipe, device="cpu", backend=Backend.TRITON)
    expected = 0
    for site in plan(TINY, recipe).layers[0].sites.values():
        layout, rows = site.layout, site.rows
        blocks = layout.num_normal_groups * -(-layout.group_size // 128) * 128
        channels = blocks if bits == 4 else layout.normal
        expected += rows * (channels * bits // 8 + layout.outliers + 4 * layout.num_scales)
    assert weight_bytes(loaded)["linears"] == TINY.num_layers * expected
    assert weight_bytes(loaded)["head"] == 512 * 256 * 4


def test_float_weights_take_two_bytes_each_in_half_precision():
    loaded = random_model("tiny", PRESETS["fp16"], device="cpu", dtype=torch.bfloat16)
    assert weight_bytes(loaded) == {
        "linears": 2 * LINEAR_WEIGHTS,
        "embedding": 2 * 512 * 256,
        "head": 2 * 512 * 256,
    }


def test_layers_share_neither_memory_nor_numbers_nor_orders():
    loaded = random_model("tiny", PRESETS["atom-w4a4kv4"], device="cpu", backend=Backend.TRITON)
    first, second = loaded.model.blocks
    for site in first.plan.sites:
        one, two = (b.linears[site].prepared.tensors[0] for b in (first, second))
        assert one.data_ptr() != two.data_ptr()
        assert not torch.equal(one, two)
    orders = [
        block.inputs[site].order
        for block, site in ((first, "qkv"), (first, "gate_up"), (second, "qkv"))
    ]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(256, dtype=torch.int32))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert first.inputs["down"].order is None


def test_one_seed_gives_one_model():
    models = [
        random_model("tiny", PRESETS["w8a8"], device="cpu", seed=seed).model for seed in (3, 3, 4)
    ]
    # A CPU may hold them in a layout of its own, which torch.equal does not compare.
    weights = [model.blocks[1].linears["down"].prepared.tensors[0].to_dense() for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_biases_float_outliers_and_fewer_layers():
    biases = {"attention_bias": True, "mlp_bias": True}
    config = read_config(SHAPES["tiny"] | biases | {"tie_word_embeddings": True})
    recipe = replace(PRESETS["atom-w4a4kv4"], outliers=OutlierSpec(format="float16"))
    loaded = random_model(config, recipe, device="cpu", num_layers=1)
    (block,) = loaded.model.blocks
    assert block.linears["qkv"].prepared.bias.shape == (512,)
    assert block.linears["o"].prepared.bias.shape == (256,)
    assert block.linears["gate_up"].prepared.bias.shape == (768,)
    weight = block.linears["qkv"].prepared.tensors[0]
    assert weight[:, -32:].std().item() == pytest.approx(STD, rel=0.05)
    assert loaded.model.head is None


def test_the_size_of_a_code():
    # int4: -7..7 equally often, mean square (2 * (1 + 4 + ... + 49)) / 15 = 280 / 15
    assert root_mean_square(get_format("int4")) == pytest.approx((280 / 15) ** 0.5)
    # e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 with both signs
    assert root_mean_square(get_format("e2m1")) == pytest.approx((68.5 / 8) ** 0.5)


def test_what_does_not_exist_or_fit_is_refused():
    with pytest.raises(ModelError, match=r"'llama-9'.*; known are llama-2-7b, "):
        find_shape("llama-9")
    recipe = replace(PRESETS["atom-w4a4kv4"], tensor_parallel=3)
    with pytest.raises(RecipeError, match="tensor_parallel 3"):
        random_model("tiny", recipe, device="cpu")
