"""transformers' own models with our linears and KV values against `quatom.load`."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import KVSpec
from quatom.recipe_file import changed
from tests.families.models import TINY, tiny_config
from tests.integrations.checkpoints import family_checkpoint, tiny_checkpoint, tiny_recipe

FAMILIES = (
    "llama-biased",  # biases in all linears
    "mistral",  # a window
    "qwen3",  # norms of q and k
    "gemma2",  # scores with a soft-cap
    "phi3-partial",  # q, k and v in one tensor; part of a head turns
    "glm4",  # neighbouring channels turn
    "opt",  # learned positions, no gate
    "cohere",  # attention beside the feed-forward layer, one norm for both
    "phi",  # the same without a gate, a bias of the head
    "ministral3",  # queries that grow with their position
    "nemotron",  # norms of 1 + w with a bias, no gate
)
LENGTH = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(family, name):
        return family_checkpoint(folder, family, name, text_file)

    return make


def from_pretrained(folder, dtype=torch.float32, **options):
    from transformers import AutoModelForCausalLM

    import quatom.integrations.transformers  # noqa: F401  makes checkpoints known

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [(family, "quatom-w4a8kv4") for family in FAMILIES]
    + [("qwen3", "atom-w4a4kv4"), ("phi3-partial", "atom-w4a4kv4")]
    + [("llama-biased", "quip-w4a16"), ("glm4", "quip-w4a16")],
)
def test_logits_are_those_of_quatom(checkpoint, family, recipe):
    check_logits(checkpoint(family, recipe))


def test_formats_that_differ_by_layer_and_site(tiny_llama_dir, text_file, tmp_path):
    overrides = [
        {"layers": "0", "sites": ["qkv", "down"], "weights": {"format": "int8"}},
        {"layers": "1", "sites": ["o"], "activations": {"format": "int8"}},
        {"layers": "1", "kv_cache": {"format": "int8"}},
    ]
    recipe = changed(tiny_recipe("atom-w4a4kv4"), {"overrides": overrides})
    check_logits(tiny_checkpoint(tmp_path, tiny_llama_dir, recipe, text_file))


@torch.inference_mode()
def check_logits(folder):
    loaded = load(folder)
    loaded.model.limit_length(LENGTH)
    tokens = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))
    cache = loaded.model.allocate_kv_cache(-(-LENGTH // 16), 16)
    context = full_sequences_context(1, LENGTH, 16, loaded.device)
    want = loaded.model.compute_logits(loaded.model(tokens, context, cache))
    got = from_pretrained(folder)(tokens[None]).logits[0]
    # Equal codes give equal results. Float32 sums in another order differ by 1e-6. Where that moves
    # one code of K or V by a step, the tokens that follow differ by 0.01. Where it moves one of a
    # token's own 4-bit activations, that token alone differs, by 0.2 at most. A cache that is
    # quantized otherwise is 0.03 and more at most tokens, from the first ones on.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error < 1e-5).float().mean() > 0.2
    assert error.median() < 0.03
    assert error.max() < 0.5


def test_it_generates_what_the_engine_generates(checkpoint):
    from quatom import LLM, SamplingParams

    folder = checkpoint("llama-biased", "quatom-w4a8kv4")
    prompt = [256, *b"The quick brown fox"]
    model = from_pretrained(folder)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    assert made[0, len(prompt) :].tolist() == list(
        LLM(folder).generate([prompt], sampling)[0].outputs[0].token_ids
    )


def test_saved_again_it_is_the_same_checkpoint(checkpoint, tmp_path):
    folder = checkpoint("qwen3", "quatom-w4a8kv4")
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    assert torch.equal(from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    assert load(tmp_path).recipe == load(folder).recipe
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "quatom"


def test_an_attention_that_knows_no_kv_format_is_refused(checkpoint):
    folder = checkpoint("qwen3", "quatom-w4a8kv4")
    with pytest.raises(ModelError, match="int4 KV cache, which attn_implementation 'eager'"):
        from_pretrained(folder, attn_implementation="eager")


NAMED_OTHERWISE = ("gpt2", "gpt_bigcode", "exaone", "gpt_neox")


@pytest.mark.parametrize("family", [family for family in NAMED_OTHERWISE if family in TINY])
def test_other_names_than_transformers_are_refused(family, checkpoint):
    with pytest.raises(ModelError, match=r"(h|layers)\.0 has other names.*use quatom.load"):
        from_pretrained(checkpoint(family, "w8a8"))


@pytest.mark.parametrize("family", ["falcon", "gpt_neo", "gptj"])
def test_a_model_that_takes_no_other_attention_is_refused(family, checkpoint):
    message = f"model of {family} does not take Quatom's attention: use quatom.load"
    with pytest.raises(ModelError, match=message):
        from_pretrained(checkpoint(family, "w8a8"))


@pytest.mark.parametrize("family", ["cohere-norms", "stablelm-norms"])
def test_a_norm_for_each_head_is_refused(family, checkpoint):
    with pytest.raises(ModelError, match=r"layers\.0 has a norm for each head of q and k.*load"):
        from_pretrained(checkpoint(family, "w8a8"))


def test_attention_with_sinks_is_refused():
    from quatom.integrations.transformers import _convert_layer

    recipe = replace(PRESETS["fp16"], kv_cache=KVSpec())
    layer = plan(read_config(tiny_config("gpt_oss").to_dict()), recipe).layers[0]
    with pytest.raises(ModelError, match=r"layers\.0 has attention with sinks: use quatom.load"):
        _convert_layer(None, layer, recipe)


def test_norms_without_weights_are_refused(checkpoint):
    """Our checkpoint has weights, by which channels are scaled; transformers' OLMo has none."""
    with pytest.raises(ModelError, match=r"layers\.0 has norms .* no weights.*quatom.load"):
        from_pretrained(checkpoint("olmo", "w8a8"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_a_device_map_of_one_device(checkpoint, device_map, tmp_path):
    pytest.importorskip("accelerate")  # transformers wants it for every device_map
    folder = checkpoint("qwen3", "quatom-w4a8kv4")
    model = from_pretrained(folder, device_map=device_map)
    want = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in model.parameters()} == {want}
    tokens = torch.arange(20)[None]
    got = model(tokens.to(want)).logits.cpu()
    if want == "cpu":
        assert torch.equal(got, from_pretrained(folder)(tokens).logits)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(again(tokens.to(want)).logits.cpu(), got)


@pytest.mark.gpu
def test_a_device_map_of_one_gpu(checkpoint):
    folder = checkpoint("qwen3", "quatom-w4a8kv4")
    model = from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda:0")
    assert {p.device for p in model.parameters()} == {torch.device("cuda:0")}
    assert model.generate(torch.arange(9)[None].cuda(), max_new_tokens=3).shape == (1, 12)


@pytest.mark.parametrize(
    ("device_map", "named"),
    [
        ({"model": "cpu", "lm_head": "cuda:0"}, "cpu, cuda:0"),
        ({"model": 0, "lm_head": 1}, "0, 1"),
        ({"": "disk"}, "disk"),
    ],
)
def test_a_device_map_of_several_devices_is_refused(checkpoint, device_map, named):
    with pytest.raises(ModelError, match=f"device_map names {named} devices, .* runs on one"):
        from_pretrained(checkpoint("qwen3", "quatom-w4a8kv4"), device_map=device_map)


def test_a_balanced_map_over_several_gpus_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="'balanced' spreads a model over 2 devices"):
        from_pretrained(checkpoint("qwen3", "quatom-w4a8kv4"), device_map="balanced")


def test_without_the_import_transformers_stops(checkpoint):
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    folder = str(checkpoint("qwen3", "quatom-w4a8kv4"))
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert 'attn_implementation="quatom"` is not supported' in done.stderr
