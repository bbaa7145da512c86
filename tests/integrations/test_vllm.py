"""vLLM with the plugin against Quatom's own engine, on a CPU: `make test-vllm`."""

import json
from math import isfinite

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from quatom.presets import PRESETS
from tests.conftest import LLAMA
from tests.families.models import tiny_config
from tests.integrations.checkpoints import family_checkpoint, tiny_checkpoint, tiny_recipe
from tests.integrations.vllm_engine import PROMPTS, assert_agree, own_greedy, vllm_greedy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_llama_dir, tiny_qwen2_dir, text_file):
    folder = tmp_path_factory.mktemp("checkpoints")
    sources = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}

    def make(model, recipe, **options):
        return tiny_checkpoint(folder, sources[model], tiny_recipe(recipe, **options), text_file)

    return make


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("llama", "quatom-w4a8kv4"),  # outliers, K turned, offset and rotated
        ("qwen2", "quatom-w4a4kv4"),  # biases, tied embeddings, scales of multiples
        ("qwen2", "atom-w4a4kv4"),  # K cached before rotary embedding
        ("llama", "w8a8"),  # vLLM's own float cache
        ("llama", "w4a16"),  # activations stay as they are
    ],
)
def test_tokens_and_logprobs_are_those_of_our_engine(checkpoint, model, recipe):
    folder = checkpoint(model, recipe)
    assert_agree(vllm_greedy(folder), own_greedy(folder), flips=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-w4a4",
        "atom-w4a8kv4",  # activations in E4M3
        "atom-fp4",
        "atom-w3a3",
        "smoothquant-w8a8",
        "smoothquant-w4a4",
        "gptq-w4a16",
        "awq-w4a16",
        "omniquant-w4a4kv4",
        "qllm-w4a4kv4",  # channels split and merged
    ],
)
def test_every_other_format_of_a_preset_runs(recipe, tmp_path, text_file):
    folder = family_checkpoint(tmp_path, "llama", recipe, text_file)
    assert_agree(vllm_greedy(folder, PROMPTS[:3]), own_greedy(folder, PROMPTS[:3]), flips=1)


@pytest.mark.parametrize(("recipe", "deferred"), [("quatom-w4a8kv4", True), ("w4a16", False)])
def test_what_quantizes_the_input_of_down_multiplies_by_the_gate(
    checkpoint, recipe, deferred, monkeypatch
):
    from quatom.integrations.vllm import operator

    widths, before = [], operator.gated_quantize

    def note(x, *rest):
        widths.append(x.shape[1])
        return before(x, *rest)

    monkeypatch.setattr(operator, "gated_quantize", note)
    vllm_greedy(checkpoint("llama", recipe), PROMPTS[:1])
    assert set(widths) == ({2 * LLAMA["intermediate_size"]} if deferred else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "mistral",  # a window
        "qwen3",  # norms of q and k
        "gemma2",  # scores with a soft-cap, windows in every other layer
        "phi3-partial",  # q, k and v in one tensor; part of a head turns; longrope
        "glm4",  # neighbouring channels turn
        "opt",  # learned positions, no gate
        "gemma",
        "gemma3",
        "granite",
        "stablelm",
        "ernie4_5",
        "exaone4",
        # By transformers' model inside of vLLM, which knows no Helium and no Ministral.
        "glm",
        "helium",
        "ministral",  # windows in every other layer
        "olmo2",
        "olmo3",
        "seed_oss",
        "smollm3",
        "starcoder2",
        "ministral3",  # queries that grow with their position
        "cohere",  # attention beside the feed-forward layer, one norm for both
        "phi",
        "nemotron",
        "arcee",
        "hyperclovax",
        "cwm",
        "jais2",
        "vaultgemma",
        "mixtral",  # experts
        "qwen2_moe",  # experts in some layers, and one that all tokens run through
        "qwen3_moe",  # experts in some layers, dense layers in others
        "olmoe",  # experts whose weights are not normalized, norms over all heads
        "granitemoe",  # experts, multipliers of the embedding, scores and residuals
        "glm4_moe",  # experts by sigmoid scores with a correction, in groups
    ],
)
def test_vllm_s_own_models_of_other_families(family, tmp_path, text_file):
    folder = family_checkpoint(tmp_path, family, "quatom-w4a8kv4", text_file)
    assert_agree(vllm_greedy(folder, PROMPTS[:3]), own_greedy(folder, PROMPTS[:3]), flips=1)


def test_prefix_caching_and_chunked_prefill_change_nothing(checkpoint):
    folder = checkpoint("llama", "quatom-w4a8kv4")
    plain = vllm_greedy(folder, enable_prefix_caching=False)
    cached = vllm_greedy(folder, enable_prefix_caching=True, rounds=2)
    assert_agree(cached, plain, flips=1)
    chunked = vllm_greedy(
        folder, enable_prefix_caching=False, max_num_batched_tokens=16, enable_chunked_prefill=True
    )
    assert_agree(chunked, plain, flips=1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dummy_weights_run(family, tmp_path, text_file):
    """What `vllm bench` and scripts/bench_vllm.py measure without a checkpoint's weights."""
    folder = family_checkpoint(tmp_path, family, "quatom-w4a8kv4", text_file)
    found = vllm_greedy(folder, PROMPTS[:2], load_format="dummy")
    assert all(isfinite(value) for one in found for value in one.logprobs)


def test_the_log_names_recipe_kernels_and_cache(checkpoint, monkeypatch):
    from quatom.integrations.vllm import state

    lines = []
    monkeypatch.setattr(state.logger, "info", lambda text, *words: lines.append(text % words))
    vllm_greedy(checkpoint("llama", "quatom-w4a8kv4"))
    assert len(lines) == 1
    assert "recipe quatom-w4a8kv4, linears on backend" in lines[0]
    assert lines[0].endswith("KV cache int4")


def refused(folder, **options):
    from quatom.errors import QuatomError

    with pytest.raises(QuatomError) as caught:
        vllm_greedy(folder, **options)
    return str(caught.value)


def test_a_degree_that_does_not_divide_is_refused_with_both_numbers(checkpoint):
    message = refused(checkpoint("llama", "quatom-w4a8kv4"), tensor_parallel_size=2)
    assert "over 2 ranks does not divide the checkpoint's tensor_parallel 1" in message


def config_alone(folder, family, recipe):
    """A folder that is refused before its weights are asked for."""
    config = tiny_config(family).to_dict()
    config["quantization_config"] = {"quant_method": "quatom", "recipe": PRESETS[recipe].to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NO_WEIGHTS = {"load_format": "dummy", "skip_tokenizer_init": True}


def test_ranks_that_would_share_experts_are_refused(tmp_path):
    folder = config_alone(tmp_path, "mixtral", "rtn-w4a4")
    message = refused(folder, tensor_parallel_size=2, **NO_WEIGHTS)
    assert "has routed experts, which are not cut or spread over ranks" in message
    assert "tensor_parallel_size 2" in message
    assert "--tensor-parallel" not in message  # the quantizer would refuse it


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("phimoe", "rtn-w4a4"), ("mixtral", "fp16"), ("minimax_m2", "rtn-w4a4")],
)
def test_experts_that_nobody_ran_are_refused_by_name(family, recipe, tmp_path):
    message = refused(config_alone(tmp_path, family, recipe), **NO_WEIGHTS)
    assert "runs routed experts of mixtral, qwen2_moe, qwen3_moe, olmoe, " in message
    assert "with quantized weights; use quatom serve" in message


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "gpt_neox", "falcon"])
def test_families_that_nobody_ran_are_refused_by_name(family, tmp_path):
    message = refused(config_alone(tmp_path, family, "rtn-w4a4"), **NO_WEIGHTS)
    assert f"is a {family}, which the plugin was not tried with: use quatom serve" in message


def test_parallel_layers_that_vllm_computes_one_after_the_other_are_refused(tmp_path):
    message = refused(config_alone(tmp_path, "stablelm-parallel", "rtn-w4a4"), **NO_WEIGHTS)
    assert "which vLLM's model of StableLM does not compute: use quatom serve" in message


def test_a_norm_for_each_head_is_refused(tmp_path):
    message = refused(config_alone(tmp_path, "cohere-norms", "rtn-w4a4"), **NO_WEIGHTS)
    assert "has a norm for each head of q and k, which the plugin was not tried with" in message


def test_experts_that_an_older_vllm_does_not_load_are_refused(tmp_path, monkeypatch):
    from quatom.integrations.vllm import state

    monkeypatch.setattr(state, "vllm_version", "0.26.0+cpu")
    message = refused(config_alone(tmp_path, "granitemoe", "rtn-w4a4"), **NO_WEIGHTS)
    assert "install a newer vLLM, or use quatom serve" in message


def test_a_factor_that_vllm_gets_wrong_in_float16_is_refused(tmp_path):
    folder = config_alone(tmp_path, "glm4_moe", "rtn-w4a4")
    message = refused(folder, dtype="float16", **NO_WEIGHTS)
    assert "multiplies what routed experts compute by 1.5" in message
    assert "use dtype bfloat16" in message


def test_a_recipe_that_does_not_fit_is_refused_in_one_line(checkpoint, tmp_path):
    """Not in the page that pydantic makes of a ValueError."""
    folder = checkpoint("llama", "quatom-w4a8kv4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recipe"]["tensor_parallel"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path, **NO_WEIGHTS)
    assert "tensor_parallel" in message
    assert "pydantic" not in message


def test_rotated_outputs_are_refused(checkpoint):
    message = refused(checkpoint("llama", "quip-w4a16"))
    assert "a recipe with incoherence" in message
    assert "use quatom serve" in message


def test_another_cache_format_is_refused(checkpoint):
    message = refused(checkpoint("llama", "quatom-w4a8kv4"), kv_cache_dtype="fp8")
    assert "has an int4 KV cache, kv_cache_dtype fp8 was asked for" in message


def test_a_cache_that_vllm_leaves_in_floating_point_is_missed(checkpoint, monkeypatch):
    """Where vLLM knows the model by a name that no setting of ours is hooked to."""
    from quatom.integrations.vllm import settings

    monkeypatch.setattr(settings, "update_settings", lambda _: None)
    message = refused(checkpoint("llama", "quatom-w4a8kv4"))
    assert "a KV cache that vLLM calls int4_per_token_head, and model.layers.0" in message
    assert "stores auto" in message


def test_attention_with_another_window_is_refused(checkpoint, monkeypatch):
    from quatom.integrations.vllm import config

    before = config.CheckpointState.check_window
    monkeypatch.setattr(
        config.CheckpointState, "check_window", lambda self, prefix, _: before(self, prefix, 16)
    )
    message = refused(checkpoint("llama", "quatom-w4a8kv4"))
    assert "attends to all tokens, in vLLM's model to 16" in message


def test_a_tensor_that_vllm_hands_to_nobody_is_missed(checkpoint, monkeypatch):
    """Its loader checks no quantized model for tensors that are not there."""
    from quatom.integrations.vllm import linear

    before = linear.Share.slices

    def slices(share, suffix, stored, number):
        found = before(share, suffix, stored, number)
        return {} if suffix == "weight_packed" and share.stored.name == "down" else found

    monkeypatch.setattr(linear.Share, "slices", slices)
    message = refused(checkpoint("llama", "quatom-w4a8kv4"))
    assert "did not load model.layers.0.mlp.down_proj.weight_packed" in message


def test_an_untried_version_is_refused(checkpoint, monkeypatch):
    from quatom.integrations.vllm import config

    monkeypatch.setattr(config, "vllm_version", "0.99.1+cpu")
    message = refused(checkpoint("llama", "quatom-w4a8kv4"))
    assert "was tried with vLLM 0.26.0 and 0.32.0, this is 0.99.1" in message


@pytest.mark.parametrize(("recipe", "most"), [("w4a16", 1e-4), ("w8a8", 0.2)])
def test_exported_checkpoints_mean_the_same_to_compressed_tensors(
    checkpoint, tmp_path, recipe, most
):
    """Read by transformers and the library compressed-tensors, which this environment has.

    vLLM's own INT8 and INT4 kernels need a CPU with AVX-512 VNNI or AMX. The library's scale of an
    activation is its largest magnitude / 127.5, Quatom's and vLLM's / 127: all codes of w8a8 may
    differ by a step, which planted outliers make a tenth of the logits. Weights are compared in
    tests/checkpoint/test_compressed_tensors.py, bit for bit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from quatom.checkpoint.compressed_tensors import export_compressed_tensors
    from quatom.loading import load
    from quatom.modeling.context import full_sequences_context

    folder = checkpoint("llama", recipe)
    target = export_compressed_tensors(folder, tmp_path / "ct")
    tokens, loaded = torch.tensor(PROMPTS[2]), load(folder)
    blocks = -(-len(tokens) // 16)
    with torch.inference_mode():
        context = full_sequences_context(1, len(tokens), 16, loaded.device)
        cache = loaded.model.allocate_kv_cache(blocks, 16)
        want = loaded.model.compute_logits(loaded.model(tokens, context, cache))
        theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        got = theirs(tokens[None]).logits[0]
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < most
