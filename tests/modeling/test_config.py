"""ModelConfig.from_hf: what transformers writes is read, what is not understood is refused."""

import json

import pytest

from quatom.errors import ModelError
from quatom.modeling.config import ModelConfig, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def test_the_fields_of_a_llama_config():
    config = ModelConfig.from_hf(LLAMA | {"bos_token_id": 1, "eos_token_id": [2, 3]})
    assert config == ModelConfig(
        architecture="llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position=512,
        bos_token_id=1,
        eos_token_ids=(2, 3),
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_the_installed_transformers_writes(kind, tmp_path):
    import transformers

    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    written = classes[kind](
        architectures=[names[kind]],
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=4096,
        rope_parameters=LLAMA3 | {"rope_theta": 7e5},
        tie_word_embeddings=True,
        eos_token_id=5,
    )
    written.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == ModelConfig.from_hf(written.to_dict())
    assert (config.architecture, config.num_layers, config.head_dim) == (kind, 3, 16)
    assert (config.rope_theta, config.tie_word_embeddings) == (7e5, True)
    assert config.rope_scaling == RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=256,
    )
    assert config.qkv_bias == (kind == "qwen2")
    assert not config.o_bias
    assert config.eos_token_ids == (5,)


# config.json of released models, without what every model has.
RELEASED = {
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1},
    "Llama 2": {"pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16"},
    "transformers 4 defaults": {"rope_scaling": None, "attention_bias": False, "use_cache": True},
    "chat fine-tune": {"_name_or_path": "x", "unsloth_fixed": True, "pad_token_id": 7},
}


@pytest.mark.parametrize("model", RELEASED)
def test_harmless_keys_change_nothing(model):
    assert ModelConfig.from_hf(LLAMA | RELEASED[model]) == ModelConfig.from_hf(LLAMA)


def test_qwen2_without_sliding_window_as_released():
    config = ModelConfig.from_hf(
        QWEN2 | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2}
    )
    assert config.sliding_window is None
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


def test_sliding_window_in_every_layer():
    keys = {"use_sliding_window": True, "sliding_window": 64}
    assert ModelConfig.from_hf(QWEN2 | keys | {"max_window_layers": 0}).sliding_window == 64
    types = {"layer_types": ["sliding_attention"] * 2}
    assert ModelConfig.from_hf(QWEN2 | keys | types).sliding_window == 64


def test_rotary_parameters_of_both_transformers_generations_agree():
    old = ModelConfig.from_hf(LLAMA | {"rope_scaling": LLAMA3})
    legacy = {"type": "linear", "factor": 2.0}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new |= {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert ModelConfig.from_hf(new) == old
    assert old.rope_scaling.kind == "llama3"
    linear = ModelConfig.from_hf(LLAMA | {"rope_scaling": legacy})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_a_missing_rope_theta_is_ten_thousand():
    without = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    assert ModelConfig.from_hf(without).rope_theta == 10000.0


def test_head_dim_may_differ_from_hidden_over_heads():
    assert ModelConfig.from_hf(LLAMA | {"head_dim": 32}).head_dim == 32


REFUSED = {
    "another architecture": ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    "not a language model": ({"architectures": ["LlamaModel"]}, "supported: LlamaForCausalLM"),
    "contradicting type": ({"model_type": "qwen2"}, "contradicts"),
    "unknown type": ({"architectures": None, "model_type": "gpt2"}, "'gpt2' is not supported"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*only 'silu' is"),
    "unknown key": ({"attn_temperature": 2.0}, "attn_temperature = 2.0 is unknown"),
    "unknown false flag": ({"use_rope": False}, "use_rope = False is unknown"),
    "tensor-parallel pre-training": ({"pretraining_tp": 2}, "pretraining_tp = 2.*only 1 is"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial rotary, new": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor = 0.5",
    ),
    "interleaved rotary": ({"rope_interleaved": True}, "rope_interleaved = True"),
    "soft-capping": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "rotary entry": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        "unknown entries .'beta'.",
    ),
    "rotary without factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
    "rotary by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "one set of rotary parameters",
    ),
    "llama3 factors": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "must be above low_freq_factor",
    ),
    "llama with a window": ({"sliding_window": 64}, "sliding_window = 64 is not supported"),
    "unequal heads": ({"num_key_value_heads": 3}, "4 is not a multiple .* 3"),
    "odd head": ({"head_dim": 15}, "head_dim 15 is odd"),
    "no head_dim": ({"hidden_size": 66}, "66 is not a multiple of num_attention_heads 4"),
    "missing size": ({"intermediate_size": None}, "intermediate_size must be a positive integer"),
    "size as text": ({"vocab_size": "128"}, "vocab_size must be a positive integer, got '128'"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
    "flag as text": ({"tie_word_embeddings": "yes"}, "must be true or false, got 'yes'"),
    "eos as text": ({"eos_token_id": "2"}, "eos_token_id must be an integer"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(reason):
    change, message = REFUSED[reason]
    with pytest.raises(ModelError, match=message) as caught:
        ModelConfig.from_hf(LLAMA | change)
    assert "\n" not in str(caught.value)


def test_sliding_attention_in_some_layers_is_refused():
    keys = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    with pytest.raises(ModelError, match=r"in 1 of 2 layers"):
        ModelConfig.from_hf(QWEN2 | keys)
    with pytest.raises(ModelError, match=r"layer_types"):
        ModelConfig.from_hf(QWEN2 | {"layer_types": ["chunked_attention"] * 2})


def test_qwen2_biases_cannot_be_configured():
    with pytest.raises(ModelError, match=r"attention_bias"):
        ModelConfig.from_hf(QWEN2 | {"attention_bias": False})
