"""Which family a config.json is of; released files; what is refused, by name."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quatom.checkpoint.schema import checkpoint_tensors
from quatom.errors import ModelError, ShapeError
from quatom.families.registry import FAMILIES, find_family, read_config
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe import KVSpec, PostRopeKeys
from tests.families.models import LLAMA3, TINY, tiny_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
"""Keys of the released gpt-oss-20b."""


def named(name: str) -> dict:
    """A small config of an architecture, without its own keys."""
    return LLAMA | {"architectures": [name], "model_type": None}


@pytest.mark.parametrize("name", TINY)
def test_architecture_or_model_type_alone_is_enough(name):
    written = tiny_config(name).to_dict()
    family = read_config(written).family
    assert find_family(written | {"architectures": None}).name == family
    assert find_family(written | {"architectures": []}).name == family
    assert find_family(written | {"model_type": None}).name == family
    assert find_family(written | {"architectures": written["architectures"] * 2}).name == family


def test_every_name_is_of_one_family():
    names = [name for family in FAMILIES for name in (*family.architectures, family.name)]
    assert len(names) == len(set(names))
    assert len({family.model_type for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.saved_as], ids=lambda f: f.name)
def test_a_family_that_transformers_saves_under_the_class_of_another(family):
    saved = LLAMA | {"architectures": [family.saved_as], "model_type": family.model_type}
    assert find_family(saved) is family
    assert find_family(saved | {"model_type": "llama"}).name == "llama"


NO_FAMILY = {
    "another architecture": (
        {"architectures": ["OtherLMHeadModel"]},
        "OtherLMHeadModel is not",
    ),
    "no language model": ({"architectures": ["LlamaModel"]}, "LlamaModel.*supported: LlamaForCau"),
    "one of two": ({"architectures": ["LlamaForCausalLM", "FooLM"]}, "FooLM is not supported"),
    "two families": (
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
        "contradicts itself: LlamaForCausalLM, MistralForCausalLM, model_type llama are different",
    ),
    "contradicting type": (
        {"model_type": "qwen2"},
        "contradicts itself: LlamaForCausalLM, model_type qwen2",
    ),
    "unknown type": ({"architectures": None, "model_type": "other"}, "'other' is not supported"),
    "nothing": ({"architectures": None, "model_type": None}, "neither architectures nor model_ty"),
    "type as list": ({"model_type": ["llama"]}, "model_type must be a string"),
    "names as number": ({"architectures": 3}, "architectures must be a list of names, got 3"),
    "images": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
        "Gemma3ForConditionalGeneration.*text_config.*save its text model alone",
    ),
}


@pytest.mark.parametrize("reason", NO_FAMILY)
def test_no_family_is_found(reason):
    change, message = NO_FAMILY[reason]
    with pytest.raises(ModelError, match=message) as caught:
        read_config(LLAMA | change)
    assert "\n" not in str(caught.value)


GROWING = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}
"""Rotary parameters of the released Ministral 3."""

# Keys of released files that a reader may stumble over, beside the sizes that every file has.
RELEASED = {
    "Command R": (
        "CohereForCausalLM",
        {"model_max_length": 131_072, "logit_scale": 0.0625, "use_qk_norm": False},
    ),
    "Command R+": (
        "CohereForCausalLM",
        {"logit_scale": 0.8333333333333334, "rope_theta": 75_000_000.0, "use_qk_norm": True},
    ),
    "Command R7B": (
        "Cohere2ForCausalLM",
        {
            "cache_implementation": "hybrid",
            "head_dim": 16,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": False,
            "use_qk_norm": False,
        },
    ),
    "Phi-2": (
        "PhiForCausalLM",
        {"partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.1},
    ),
    "Pythia": (
        "GPTNeoXForCausalLM",
        {
            "num_key_value_heads": None,
            "rotary_emb_base": 10_000,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
        },
    ),
    "Falcon 7B": (
        "FalconForCausalLM",
        {
            "alibi": False,
            "apply_residual_connection_post_layernorm": False,
            "bias": False,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
        },
    ),
    "Falcon 2 11B": (
        "FalconForCausalLM",
        {
            "ff_factor": 4,
            "ffn_hidden_size": 96,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "rope_theta": 500_042.0,
        },
    ),
    "GPT-J": (
        "GPTJForCausalLM",
        {
            "attn_pdrop": 0.0,
            "n_inner": None,
            "rotary": True,
            "rotary_dim": 8,
            "scale_attn_weights": True,
            "summary_type": "cls_index",
        },
    ),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            "attention_layers": ["global", "local"],
            "embed_dropout": 0,
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-05,
            "resid_dropout": 0,
            "summary_type": "cls_index",
            "window_size": 256,
        },
    ),
    "OLMo": (
        "OlmoForCausalLM",
        {"clip_qkv": None, "rope_scaling": None, "rope_theta": 10000.0},
    ),
    "StableLM 2 12B": (
        "StableLmForCausalLM",
        {
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.25,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "use_qkv_bias": False,
        },
    ),
    "Llama 1": ("LlamaForCausalLM", {"max_sequence_length": 2048, "pad_token_id": 0}),
    "Llama 1, first name": ("LLaMAForCausalLM", {"max_sequence_length": 2048}),
    "Llama 2": ("LlamaForCausalLM", {"pretraining_tp": 2, "rope_scaling": None}),
    "Vicuna": (
        "LlamaForCausalLM",
        {"max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    ),
    "SmolLM2": (
        "LlamaForCausalLM",
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
    ),
    "fine-tune by unsloth": (
        "LlamaForCausalLM",
        {"unsloth_fixed": True, "unsloth_version": "2025.1", "_name_or_path": "x"},
    ),
    "fine-tune with noise": ("MistralForCausalLM", {"neftune_noise_alpha": 5}),
    "Mistral 7B v0.2": ("MistralForCausalLM", {"sliding_window": None, "rope_theta": 1e6}),
    "Ministral 3": ("Ministral3ForCausalLM", {"sliding_window": None, "rope_parameters": GROWING}),
    "Ministral 3 without growth": (
        "Ministral3ForCausalLM",
        {"rope_parameters": GROWING | {"llama_4_scaling_beta": 0}},
    ),
    "Qwen2.5": (
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 2,
            "use_mrope": False,
            "attention_bias": True,
            "is_causal": True,
        },
    ),
    "SmolLM3": (
        "SmolLM3ForCausalLM",
        {
            "layer_types": ["full_attention"] * 2,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1],
            "pretraining_tp": 2,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "Qwen3": ("Qwen3ForCausalLM", {"attention_bias": False, "max_window_layers": 36}),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        {
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 144,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
        },
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {
            "cache_implementation": "hybrid",
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window_pattern": 6,
            "_sliding_window_pattern": 6,
            "use_bidirectional_attention": False,
        },
    ),
    "Phi-3-mini": (
        "Phi3ForCausalLM",
        {
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "sliding_window": 2047,
        },
    ),
    "Phi-4-mini": (
        "Phi3ForCausalLM",
        {
            "attention_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 0.75,
            "sliding_window": 262144,
        },
    ),
    "EXAONE 3.5": (
        "ExaoneForCausalLM",
        {
            "activation_function": "silu",
            "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
            "embed_dropout": 0.0,
            "head_dim": 16,
            "layer_norm_epsilon": 1e-05,
            "num_hidden_layers": None,
            "num_layers": 2,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            "rope_theta": 1000000,
        },
    ),
    "OLMo-3": (
        "Olmo3ForCausalLM",
        {
            "rope_theta": 500000,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
        },
    ),
    "StarCoder2": (
        "Starcoder2ForCausalLM",
        {
            "activation_function": "gelu",
            "attention_softmax_in_fp32": True,
            "embedding_dropout": 0.1,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-05,
            "mlp_type": "default",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
        },
    ),
    "StableLM, early": (
        "StableLmForCausalLM",
        {"num_key_value_heads": 4, "rope_pct": 0.25, "norm_eps": 1e-5, "use_qkv_bias": False},
    ),
    "Minitron 8B": (
        "NemotronForCausalLM",
        {
            "hidden_act": "relu2",
            "head_dim": 16,
            "norm_eps": 1e-05,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000,
        },
    ),
    "AFM-4.5B": (
        "ArceeForCausalLM",
        {
            "attention_bias": False,
            "head_dim": 16,
            "hidden_act": "relu2",
            "mlp_bias": False,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 20.0,
                "mscale": 1.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "rope_theta": 10000,
        },
    ),
    "HyperCLOVA X SEED Think": (
        "HyperCLOVAXForCausalLM",
        {
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 10.0,
            "head_dim": 16,
            "logits_scaling": 0.125,
            "mlp_bias": False,
            "residual_multiplier": 1.0,
            "use_post_norm": True,
        },
    ),
    "InternLM3": (
        "InternLM3ForCausalLM",
        {
            "bias": False,
            "head_dim": 16,
            "qkv_bias": False,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
        },
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "n_ctx": 1024,
            "n_positions": 1024,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True}},
        },
    ),
    "StarCoder": (
        "GPTBigCodeForCausalLM",
        {
            "activation_function": "gelu",
            "attention_softmax_in_fp32": True,
            "inference_runner": 0,
            "max_batch_size": None,
            "max_sequence_length": None,
            "multi_query": True,
            "n_inner": 256,
            "pad_key_length": True,
            "pre_allocate_kv_cache": False,
            "scale_attention_softmax_in_fp32": True,
            "summary_type": "cls_index",
            "validate_runner_input": True,
        },
    ),
    "MiniMax-M2": (
        "MiniMaxM2ForCausalLM",
        {
            "attn_type_list": [1, 1],
            "head_dim": 16,
            "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_beta": 1.0,
            "layernorm_mlp_beta": 1.0,
            "mlp_intermediate_size": 8192,
            "mtp_transformer_layers": 1,
            "num_mtp_modules": 3,
            "qk_norm_type": "per_layer",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "rope_theta": 5000000,
            "rotary_dim": 8,
            "router_jitter_noise": 0.0,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "sliding_window": None,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
        },
    ),
    "ERNIE 4.5 with experts": (
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_use_aux_free": True,
            "use_bias": False,
        },
    ),
    "OPT": (
        "OPTForCausalLM",
        {
            "_remove_final_layer_norm": False,
            "activation_dropout": 0.0,
            "do_layer_norm_before": True,
            "ffn_dim": 96,
            "init_std": 0.02,
            "intermediate_size": None,
            "layerdrop": 0.0,
            "num_key_value_heads": None,
            "prefix": "</s>",
            "word_embed_proj_dim": 64,
        },
    ),
}


@pytest.mark.parametrize("model", RELEASED)
def test_keys_of_released_files(model):
    name, keys = RELEASED[model]
    read_config(named(name) | OWN.get(name.removesuffix("ForCausalLM"), {}) | keys)


def test_harmless_keys_change_nothing():
    for model in ("Llama 1", "Llama 2", "SmolLM2", "fine-tune by unsloth"):
        assert read_config(LLAMA | RELEASED[model][1]) == read_config(LLAMA)
    types = {"layer_types": ["full_attention", "attention"]}
    assert read_config(LLAMA | types) == read_config(LLAMA)


@pytest.mark.parametrize(
    ("names", "activation"),
    [
        (("silu", "swish"), "silu"),
        (("gelu", "gelu_python"), "gelu"),
        (("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
        (("relu",), "relu"),
        (("relu2",), "relu2"),
    ],
)
def test_activations_compute_what_transformers_does(names, activation):
    import torch
    from transformers.activations import ACT2FN

    ours = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }
    x = torch.linspace(-6, 6, 1001)
    for name in names:
        layer = read_config(LLAMA | {"hidden_act": name}).layers[0]
        assert layer.feed_forward.activation == activation
        # The variants differ in the tenth digit of a constant: a few ulps of values up to 6.
        torch.testing.assert_close(ACT2FN[name](x), ours[activation](x), rtol=1e-5, atol=1e-6)


REFUSED = {
    "another activation": ("Llama", {"hidden_act": "mish"}, "hidden_act = 'mish'.*supported: s"),
    "unknown key": ("Llama", {"attn_temperature": 2.0}, "attn_temperature = 2.0 is unknown"),
    "unknown false flag": ("Llama", {"use_rope": False}, "use_rope = False is unknown"),
    "soft-cap of Llama": ("Llama", {"attn_logit_softcapping": 30.0}, "softcapping = 30.0"),
    "window of Llama": ("Llama", {"sliding_window": 64}, "sliding_window = 64 is unknown"),
    "partial rotary": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "interleaved rotary": ("Llama", {"rope_interleaved": True}, "rope_interleaved = True"),
    "unequal heads": ("Llama", {"num_key_value_heads": 3}, "4 is not a multiple .* 3"),
    "odd head": ("Llama", {"head_dim": 15}, "15"),
    "no head_dim": ("Llama", {"hidden_size": 66}, "66 is not a multiple of num_attention_heads 4"),
    "missing size": ("Llama", {"intermediate_size": None}, "intermediate_size must be a positive"),
    "size as text": ("Llama", {"vocab_size": "128"}, "vocab_size must be a positive .* '128'"),
    "size as float": ("Llama", {"vocab_size": 128.0}, "vocab_size must be a positive .* 128.0"),
    "eps": ("Llama", {"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, got 0.0"),
    "flag as text": ("Llama", {"tie_word_embeddings": "yes"}, "must be true or false, got 'yes'"),
    "eos as text": ("Llama", {"eos_token_id": "2"}, "eos_token_id must be an integer"),
    "layer types": ("Mistral", {"layer_types": ["full_attention"] * 2}, "in all; remove layer_t"),
    "layer types of Llama": (
        "Llama",
        {"layer_types": ["sliding_attention", "full_attention"]},
        "1 of 2 layers with a sliding window, but this family has sliding_window = None in all",
    ),
    "mistral bias": ("Mistral", {"attention_bias": True}, "attention_bias = True"),
    "no window": (
        "Qwen2",
        {"layer_types": ["sliding_attention"] * 2},
        "2 layers of sliding_attention, but sliding_window is null or switched off",
    ),
    "chunks": (
        "Ministral",
        {"layer_types": ["chunked_attention"] * 2},
        "layer_types has the entry 'chunked_attention'",
    ),
    "too few types": ("Ministral", {"layer_types": ["full_attention"]}, "a list of 2 entries"),
    "qwen2 bias": ("Qwen2", {"attention_bias": False}, "attention_bias = False.*only True is"),
    "both ways": ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "soft-cap of Gemma 3": ("Gemma3", {"attn_logit_softcapping": 50.0}, "only null is"),
    "Gemma's window, twice": ("Gemma2", {"sliding_window_size": 99}, "sliding_window_size = 99"),
    "Phi-4 variant": ("Phi3", {"full_attn_mod": 2}, "full_attn_mod = 2.*only 1 is"),
    "head bias": ("Phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
    "growth of queries unsaid": (
        "Ministral3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "llama_4_scaling_beta must be a number, got None",
    ),
    "growth of queries, no length": (
        "Ministral3",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta 0.1 lets queries grow beyond .* yarn alone",
    ),
    "growth of queries below 0": (
        "Ministral3",
        {"rope_parameters": GROWING | {"llama_4_scaling_beta": -0.1}},
        "growth of queries with their position must be positive",
    ),
    "theta beside no rotary parameters": ("Ministral3", {"rope_theta": 5e5}, "rope_theta = 5"),
    "theta of OLMo-3": ("Olmo3", {"rope_theta": 1e4}, "rope_theta = 10000.0: releases of transf"),
    "rotary layers": ("SmolLM3", {"no_rope_layers": [1]}, "a list of 2 entries"),
    "norms of Cohere 2's heads": ("Cohere2", {"use_qk_norm": True}, "use_qk_norm = True"),
    "norms of Phi's heads": ("Phi", {"qk_layernorm": True}, "qk_layernorm = True"),
    "order of Cohere's windows": (
        "Cohere2",
        {"order_of_interleaved_layers": "global_attn_first"},
        "order_of_interleaved_layers",
    ),
    "biases by distance": ("Falcon", {"alibi": True}, "alibi = True"),
    "Falcon's norms": (
        "Falcon",
        {"num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn = 2",
    ),
    "order of GPT-Neo's windows": (
        "GPTNeo",
        {"attention_types": [[["global", "near"], 1]]},
        "attention_types must give 2 layers, each global or local.*it gives 2",
    ),
    "few of GPT-Neo's layers": (
        "GPTNeo",
        {"attention_types": [[["local"], 1]]},
        "attention_types must give 2 layers.*it gives 1",
    ),
    "no list of GPT-Neo's layers": ("GPTNeo", {"attention_types": "local"}, "it gives 0"),
    "GPT-Neo's layers said twice": (
        "GPTNeo",
        {"attention_layers": ["local", "global"]},
        "attention_layers = .'local', 'global'. is not supported",
    ),
    "clamped q, k and v": ("Olmo", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    "norm after": ("OPT", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    "projected embeddings": ("OPT", {"word_embed_proj_dim": 32}, "word_embed_proj_dim = 32"),
    "no final norm": ("OPT", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    "one head of K and V alone": ("GPTBigCode", {"multi_query": False}, "multi_query = False"),
    "cross-attention": ("GPTBigCode", {"add_cross_attention": True}, "add_cross_attention = True"),
    "norm type": ("Starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
}
OWN = {
    "OPT": {"intermediate_size": None, "num_key_value_heads": None, "ffn_dim": 96},
    "StableLm": {"num_key_value_heads": 4},
    "GPTBigCode": {"intermediate_size": None, "num_key_value_heads": None},
    "GPTJ": {"intermediate_size": None, "num_key_value_heads": None, "rotary_dim": 8},
    "GPTNeo": {"num_key_value_heads": None, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {"num_key_value_heads": None},
    "Falcon": {"intermediate_size": None, "num_key_value_heads": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(reason):
    prefix, change, message = REFUSED[reason]
    good = named(f"{prefix}ForCausalLM") | OWN.get(prefix, {})
    read_config(good)
    with pytest.raises(ModelError, match=message) as caught:
        read_config(good | change)
    assert "\n" not in str(caught.value)


def test_stablelm_2_12b_has_heads_that_no_cache_holds():
    sizes = {"hidden_size": 5120, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = read_config(named("StableLmForCausalLM") | RELEASED["StableLM 2 12B"][1] | sizes)
    with pytest.raises(ShapeError, match="head_dim 160 is not supported; the paged cache has 64"):
        plan(config, PRESETS["fp16"]).check_cache()


def test_a_family_is_a_short_file():
    for family in FAMILIES:
        source = Path(inspect.getfile(family.read))
        assert len(source.read_text().splitlines()) < 100, source.name


def test_the_page_on_adding_a_model_quotes_the_source():
    page = Path(__file__).resolve().parents[2] / "docs" / "design" / "adding-a-model.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    source = "".join(
        inspect.getsource(inspect.getmodule(find_family(named(name)).read))
        for name in ("GlmForCausalLM", "MixtralForCausalLM")
    )
    assert len(blocks) == 4
    assert all(block in source for block in blocks)


def test_gpt_oss_20b_as_released():
    config = read_config(GPT_OSS)
    windows = [layer.attention.window for layer in config.layers]
    assert windows == [128, None] * 12
    attention, experts = config.layers[0].attention, config.layers[0].experts
    assert (attention.head_dim, attention.q_size, attention.kv_size) == (64, 4096, 512)
    assert attention.sinks
    assert attention.rope.theta == 150_000
    assert (attention.rope.scaling.factor, attention.rope.scaling.truncate) == (32.0, False)
    assert (experts.count, experts.top_k, experts.router.normalized) == (32, 4, True)
    assert experts.feed_forward.activation == "clamped_swiglu"
    assert all(linear.bias for site in config.layers[0].linears.values() for linear in site)
    assert config.max_position == 131_072
    # Nothing said of rotary embedding means the same.
    rest = {k: v for k, v in GPT_OSS.items() if k != "rope_scaling"}
    assert read_config(rest).layers == config.layers


def test_gpt_oss_20b_under_recipes():
    config = read_config(GPT_OSS)
    layer = plan(config, PRESETS["quatom-w4a4kv4"]).layers[0]
    # 2880 channels are 21 whole groups, a shorter one and the outliers; those of o are 4096.
    for site in ("qkv", "experts_gate_up", "experts_down"):
        assert layer.sites[site].layout.group_sizes == (*(128,) * 21, 64, 128)
    assert layer.sites["o"].layout.group_sizes == (128,) * 32
    plain = plan(config, PRESETS["w4a16"]).layers[0]
    assert plain.sites["qkv"].layout.group_sizes == (*(128,) * 22, 64)
    # What is subtracted from all scores of a query changes what its sink weighs.
    keys = PostRopeKeys(offset="mean")
    offset = replace(PRESETS["quatom-w4a4kv4"], kv_cache=KVSpec(keys=keys))
    layers = plan(config, offset).layers
    assert not any(layer.offsets_keys for layer in layers)
    assert "model.layers.0.self_attn.sinks" in checkpoint_tensors(plan(config, offset))


def test_ministral_3_as_released():
    config = read_config(named("Ministral3ForCausalLM") | {"rope_parameters": GROWING})
    attention = config.layers[0].attention
    assert (attention.query_growth.beta, attention.query_growth.length) == (0.1, 16384)
    assert (attention.rope.scaling.factor, attention.rope.scaling.attention_factor) == (16.0, 1.0)
    assert (config.max_position, attention.head_dim) == (262_144, 128)
    # Nothing said of rotary embedding means the same.
    assert read_config(named("Ministral3ForCausalLM")).layers == config.layers
    still = GROWING | {"llama_4_scaling_beta": 0.0}
    (rope,) = {id(r): r for r in config.ropes()}.values()
    config = read_config(named("Ministral3ForCausalLM") | {"rope_parameters": still})
    assert config.layers[0].attention.query_growth is None
    assert config.layers[0].attention.rope == rope


@pytest.mark.parametrize(
    "change",
    [{"scale_attn_by_inverse_layer_idx": True}, {"n_ctx": 1024}, {"num_key_value_heads": 1}],
)
def test_what_gpt2_does_not_compute(change):
    config = tiny_config("gpt2").to_dict()
    read_config(config)
    with pytest.raises(ModelError, match=f"{next(iter(change))} = .* is not supported"):
        read_config(config | change)


def test_internlm3_has_biases_by_two_keys():
    layer = read_config(named("InternLM3ForCausalLM") | {"qkv_bias": True, "bias": False}).layers[0]
    biases = {site: linears[0].bias for site, linears in layer.linears.items()}
    assert biases == {"qkv": True, "o": False, "gate_up": False, "down": False}


def test_granite4_without_a_state():
    config = tiny_config("granite4").to_dict()
    still = read_config(config | {"position_embedding_type": "nope"})
    assert all(layer.attention.rope is None for layer in still.layers)
    assert read_config(config | {"layer_types": ["attention"] * 2}) == read_config(config)
    hybrid = {"layer_types": ["mamba", "attention"]}
    for change, message in [
        (hybrid, r"1 of 2 layers are state-space layers \(Mamba\)"),
        ({"layer_types": None}, "2 of 2 layers are state-space layers"),
        ({"num_local_experts": 4}, "num_local_experts 4 is not supported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
    ]:
        with pytest.raises(ModelError, match=message):
            read_config(config | change)


MOE_REFUSALS = [
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers must be a list of layers"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
    ("mixtral", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("granitemoe", {"shared_intermediate_size": 64}, "shared_intermediate_size = 64"),
    ("phimoe", {"num_experts_per_tok": 3}, "sparsemixer chooses 2 experts"),
    ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit = 5.0.*only 7.0 is"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, r"swiglu_alpha = 1.0"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("gpt_oss", {"experts_per_token": 2}, "contradict each other"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "entry 'chunked_attention'"),
    ("glm4_moe", {"n_group": 3}, "8 experts cannot be cut into 3"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("glm4_moe", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ("dots1", {"moe_layer_freq": 2}, "moe_layer_freq = 2.*only 1 is"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts must be a positive"),
    ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list has the entry 0"),
    ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
    ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias = False.*only True is"),
    ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size = 64"),
    ("minimax_m2", {"layernorm_mlp_beta": 0.5}, "layernorm_mlp_beta = 0.5"),
    ("minimax_m2", {"rotary_dim": 24}, "rotary_dim = 24 and partial_rotary_factor contradict.*32"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias = True"),
    ("ernie4_5_moe", {"moe_k": 7}, "7 experts per token of 6"),
    ("ernie4_5_moe", {"moe_use_aux_free": False}, "moe_use_aux_free = False"),
    ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace = 1"),
    ("solar_open", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("exaone_moe", {"mlp_layer_types": ["sparse"]}, "a list of 4 entries"),
    ("exaone_moe", {"mlp_layer_types": ["moe"] * 4}, "entry 'moe'"),
    ("hy_v3", {"mlp_bias": True}, "mlp_bias = True"),
    ("flex_olmo", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("mellum", {"rope_theta": 1e4}, "rope_theta = 10000.0"),
]


@pytest.mark.parametrize(("name", "change", "message"), MOE_REFUSALS)
def test_what_experts_do_not_compute_is_refused_by_name(name, change, message):
    with pytest.raises(ModelError, match=message):
        read_config(tiny_config(name).to_dict() | change)


def test_factors_of_phi_moe_must_be_one():
    keys = tiny_config("phimoe").to_dict()
    keys["rope_parameters"] = keys["rope_parameters"] | {"long_mscale": 1.3}
    with pytest.raises(ModelError, match=r"short_mscale 1.2 and long_mscale 1.3"):
        read_config(keys)
