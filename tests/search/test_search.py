"""Search: what it measures, what it chooses, and the recipe file that comes of it."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from quatom.checkpoint.reader import open_source
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.errors import CalibrationError, RecipeError
from quatom.loading import load
from quatom.modeling.rotary import RotaryTables
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.quantize.statistics import run_block
from quatom.quantize.walk import embed
from quatom.recipe import CalibrationSpec
from quatom.recipe_file import find_recipe
from quatom.recipe_overrides import ActivationChange, KVChange, Override, WeightChange
from quatom.search.block import MeasuredBlock
from quatom.search.merge import in_ranges, merge
from quatom.search.options import KINDS, averages, mean_bits, places_of, read_kinds
from quatom.search.run import chosen_options, search_recipe
from quatom.search.sensitivity import SensitivityWalk
from tests.conftest import LLAMA, make_model
from tests.families.models import save_tiny

CONFIG = LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TEXT = CalibrationSpec(num_samples=8, sequence_length=48)
PLANTED = 1
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "three", CONFIG, seed=4)


@pytest.fixture(scope="module")
def planted_dir(tmp_path_factory):
    """Block 1 adds much to the residual stream, and the others next to nothing."""
    import transformers

    folder = make_model(tmp_path_factory.mktemp("models") / "planted", CONFIG, seed=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 20.0
        for index, layer in enumerate(model.model.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight *= 4.0 if index == PLANTED else 0.02
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model_dir):
    return plan(load(model_dir).config, PRESETS["quatom-w4a4kv4"])


def searched(folder, text_file, bits, **options):
    return search_recipe(folder, bits, calibration=text_file, text=TEXT, device="cpu", **options)


def test_costs_add_up_to_the_bits_of_the_recipe(base):
    """All combinations of kinds: the mean of what the plan with all overrides stores."""
    for kinds in (KINDS, ("weights",), ("activations", "kv_cache"), ("kv_cache",)):
        places = places_of(base, kinds, outliers=True)
        for number in (0, -1):
            chosen = [place.options[number] for place in places]
            recipe = replace(base.recipe, overrides=merge(o.override for o in chosen))
            raised = plan(base.config, recipe)
            cost = sum((option.cost for option in chosen), Fraction(0))
            assert mean_bits(raised, kinds) == mean_bits(base, kinds) + cost
            for kind in set(KINDS) - set(kinds):
                assert averages(raised)[kind] == averages(base)[kind]


def test_what_is_offered(base):
    names = {
        (place.name, option.name)
        for place in places_of(base, KINDS, outliers=True)
        for option in place.options
        if place.layer == 2
    }
    sites = ("qkv", "o", "gate_up", "down")
    words = ("weights int8", "activations int8", "weights and activations int8", "64 outliers")
    assert names == {(s, w) for s in sites for w in words} | {("kv_cache", "KV cache int8")}
    assert not any("outliers" in o.name for p in places_of(base, KINDS) for o in p.options)
    only = {o.name for place in places_of(base, ("activations",)) for o in place.options}
    assert only == {"activations int8"}
    w4a8 = plan(base.config, PRESETS["quatom-w4a8kv4"])
    assert {p.name for p in places_of(w4a8, ("activations", "kv_cache"))} == {"kv_cache"}
    atom = plan(base.config, PRESETS["atom-w4a4kv4"])
    own = places_of(atom, ("activations",))[0].options[0].override.activations
    assert own == ActivationChange(format="int8", clip_ratio=1.0)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("w8a8", KINDS), ("quatom-w4a8kv4", ("activations",)), ("atom-fp4", ("weights",))],
)
def test_a_base_that_leaves_nothing_to_raise(name, kinds, base):
    with pytest.raises(RecipeError, match=f"recipe {name} leaves nothing to raise in"):
        places_of(plan(base.config, PRESETS[name]), kinds)


def test_the_search_is_the_best_of_all_combinations(model_dir, text_file):
    """Of one kind, where every combination can be tried."""
    found = searched(model_dir, text_file, 7.2, kinds=("kv_cache",))
    assert len(found.places) == 3
    budget = Fraction("7.2") - mean_bits(found.base, found.kinds)
    best = 0.0
    for number in range(2**3):
        taken = [i for i in range(3) if number >> i & 1]
        if sum(found.places[i].options[0].cost for i in taken) <= budget:
            best = max(best, sum(found.gains[i][0] for i in taken))
    assert found.recipe.name == "quatom-w4a4kv4-at-7.2-bits-of-kv_cache"
    gained = sum(found.divergences) - found.divergence
    assert gained == pytest.approx(best)
    assert gained > 0


def test_a_planted_layer_gets_the_bits(planted_dir, text_file):
    # Two inputs of 128 of the 3 * 576 channels can take INT8, 0.2222 bits each.
    base = plan(load(planted_dir).config, PRESETS["quatom-w4a4kv4"])
    bits = round(float(averages(base)["activations"]) + 0.45, 3)
    found = searched(planted_dir, text_file, bits, kinds=("activations",))
    others = [d for i, d in enumerate(found.divergences) if i != PLANTED]
    assert found.divergences[PLANTED] > 10 * max(others)
    chosen = chosen_options(found.places, found.chosen)
    assert [option.layer.index for option in chosen] == [PLANTED] * 2
    assert found.divergence < sum(found.divergences)


def test_search_quantize_generate(model_dir, text_file, tmp_path, shell):
    out, results = tmp_path / "recipe.json", tmp_path / "search.json"
    words = ("search", model_dir, "--bits", 5.25, "--calibration", text_file, "--output", out)
    sizes = ("--num-samples", 8, "--sequence-length", 48)
    done = shell(*words, *sizes, "--json", results, "--name", "three")
    assert done.status == 0, done
    assert "mean of weights, activations, kv_cache" in done.out
    file = json.loads(out.read_text())
    assert file["base"] == "quatom-w4a4kv4"
    recipe, _ = find_recipe(str(out))
    assert recipe.name == "quatom-w4a4kv4-at-5.25-bits"
    assert recipe.overrides

    # The same again, from Python: bit for bit.
    again = searched(model_dir, text_file, 5.25)
    assert again.recipe == recipe
    (entry,) = json.loads(results.read_text())["results"]
    assert entry["expected_divergence"] == again.divergence
    assert entry["mean_bits"] <= 5.25
    assert [list(point) for point in again.curve] == entry["curve"]
    assert entry["curve"][0] == [entry["base_mean_bits"], entry["base_divergence"]]
    assert sum(option["chosen"] for option in entry["options"]) == len(
        chosen_options(again.places, again.chosen)
    )

    target = tmp_path / "q"
    quantize = ("quantize", model_dir, target, "--recipe", out, "--calibration", text_file)
    assert shell(*quantize, *sizes).status == 0
    loaded = load(target)
    assert loaded.bits_per_weight == pytest.approx(entry["bits_per_weight"])
    own = open_source(target).recipe
    assert own.overrides == recipe.overrides
    error = shell.fails("search", target, *words[2:])
    assert "q is already quantized (quatom-w4a4kv4-at-5.25-bits); search on the float" in error
    inspected = shell("inspect", target)
    assert "Formats of quatom-w4a4kv4-at-5.25-bits" in inspected.out
    prompt = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (answer,) = LLM(target, max_model_len=64).generate([[1, 2, 3]], prompt)
    assert len(answer.token_ids) == 4


def test_an_option_changes_its_place_alone(model_dir):
    """Built from what the base has, it is the block that a whole new quantization gives.

    That is so where the option leaves all inputs of the block's sites as they are, as other formats
    of weights do, and other outliers of the last input.
    """
    source = open_source(model_dir)
    config = source.model_config
    base = PRESETS["quatom-w4a4kv4"]
    tokens = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))
    rotary = RotaryTables(config, 32, CPU["device"])
    hidden = embed(source, tokens, *CPU.values())

    def block_of(recipe):
        resolved = plan(config, recipe)
        setting = SensitivityWalk(source, resolved, **CPU).setting
        return MeasuredBlock(setting, resolved.layers[0], hidden, rotary)

    block, compared = block_of(base), []
    unchanged = run_block(block.base, hidden, rotary)
    for place in places_of(plan(config, base), KINDS, outliers=True):
        for option in place.options if place.layer == 0 else ():
            ours = run_block(block.raised(option), hidden, rotary)
            assert not torch.equal(ours, unchanged), (place.name, option.name)
            more = place.name == "down" and option.name == "64 outliers"
            if more or option.name == "weights int8":
                anew = block_of(replace(base, overrides=(option.override,))).base
                assert torch.equal(ours, run_block(anew, hidden, rotary)), (place.name, option.name)
                compared.append(place.name)
    assert compared == ["qkv", "o", "gate_up", "down", "down"]


def test_places_are_merged():
    wide = WeightChange(format="int8", scale_format="float16")
    cache = KVChange(format="int8")
    singles = [
        *(Override(layers=str(i), sites=("down",), weights=wide) for i in (0, 1, 2, 5)),
        *(Override(layers=str(i), sites=("o",), weights=wide) for i in (5, 2, 1, 0)),
        Override(layers="4", sites=("qkv",), weights=wide),
        Override(layers="3", kv_cache=cache),
        Override(layers="5", kv_cache=cache),
    ]
    assert merge(singles) == (
        Override(layers="0-2,5", sites=("o", "down"), weights=wide),
        Override(layers="4", sites=("qkv",), weights=wide),
        Override(layers="3,5", kv_cache=cache),
    )
    assert merge([]) == ()
    assert in_ranges([7]) == "7"


@pytest.mark.parametrize("bits", [float("nan"), float("inf")])
def test_a_budget_that_is_no_number_is_refused(bits, model_dir, shell, tmp_path):
    words = ("search", model_dir, "--bits", bits, "--calibration", "absent.txt")
    error = shell.fails(*words, "--output", tmp_path / "r.json")
    assert error == f"quatom: bits must be a finite number, got {bits}\n"


@pytest.mark.parametrize("bits", [4.0, 8.6, -1.0])
def test_a_budget_out_of_range_is_refused_with_numbers(bits, model_dir, shell, tmp_path):
    words = ("search", model_dir, "--bits", bits, "--calibration", "absent.txt")
    error = shell.fails(*words, "--output", tmp_path / "r.json")
    assert f"a budget of {bits:g} bits is out of range: quatom-w4a4kv4 takes 5.0213" in error
    assert "and with everything raised 8.3907" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "r.txt"), "must be a .json file"),
        (("--output", "none/r.json"), "none is no folder"),
        (("--base", "quatom-w4"), "quatom-w4a4kv4"),
        (("--base", "fp16"), "base 'fp16' leaves the weights as they are"),
        (("--raise", "weights,cache"), "--raise takes weights, activations, kv_cache, .* 'cache'"),
        (("--dtype", "int4"), "dtype must be one of"),
        (("--calibration", "absent.txt"), "absent.txt"),
        (("--sequence-length", "1000"), "1000 tokens are longer than the model's 512"),
    ],
)
def test_bad_input_is_found_before_the_work(
    options, message, model_dir, text_file, shell, tmp_path, monkeypatch
):
    import re

    monkeypatch.chdir(tmp_path)
    never = "quatom.search.run.SensitivityWalk"
    monkeypatch.setattr(never, lambda *_, **__: pytest.fail("the work began"))
    given = {"--bits": "5.5", "--calibration": text_file, "--output": "r.json"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    words = [word for pair in given.items() for word in pair]
    assert re.search(message, shell.fails("search", model_dir, *words))
    assert list(tmp_path.iterdir()) == []


def test_too_few_sequences(model_dir):
    tokens = torch.zeros(3, 8, dtype=torch.int64)
    with pytest.raises(CalibrationError, match="and 3 were given: give --num-samples 4"):
        search_recipe(model_dir, 5.5, calibration=tokens)


def test_kinds_are_read_in_any_order():
    assert read_kinds("kv_cache, weights") == ("weights", "kv_cache")


def test_experts_are_places_of_their_own(text_file, tmp_path):
    folder = save_tiny(tmp_path / "moe", "mixtral")
    found = searched(folder, text_file, 6.0, kinds=("activations", "kv_cache"))
    names = {place.name for place in found.places}
    assert names == {"qkv", "o", "experts_gate_up", "experts_down", "kv_cache"}
    assert found.divergence < sum(found.divergences)
    assert mean_bits(found.plan, found.kinds) <= 6
