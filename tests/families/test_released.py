"""Keys of released config.json files that the classes of transformers do not have."""

import math

import pytest

from quatom.errors import ModelError
from quatom.families.registry import read_config
from tests.families.models import TINY, tiny_config

# model: (what its files say besides, a value of it that would change the model)
RELEASED = {
    "gpt2": (
        {"n_special": 0, "predict_special_tokens": True, "output_past": True},
        {"n_special": 3},
    ),
    "minimax_m2": (
        {"shared_moe_mode": "sigmoid", "shared_intermediate_size": 0},
        {"shared_intermediate_size": 32},
    ),
    "dots1": ({"scoring_func": "noaux_tc"}, {"scoring_func": "softmax"}),
    "ernie4_5_moe": ({"use_rmsnorm": True}, {"use_rmsnorm": False}),
    "qwen3_moe": (
        {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
        {"shared_expert_intermediate_size": 32},
    ),
    "llama": (
        {"image_token_id": 9, "image_token_index": 9, "use_qk_norm": False},
        {"qk_norm": True},
    ),
    "qwen3": ({"use_qk_norm": True}, {"use_qk_norm": False}),
}


@pytest.mark.parametrize("name", [name for name in RELEASED if name in TINY])
def test_a_key_of_released_files_is_read_and_what_it_must_not_say_is_refused(name):
    says, wrong = RELEASED[name]
    config = tiny_config(name).to_dict()
    assert read_config(config | says) == read_config(config)
    with pytest.raises(ModelError, match=next(iter(wrong))):
        read_config(config | says | wrong)


# family: (what other keys or the family itself say, each once more; what contradicts them)
RESTATED = {
    "llama": (
        {
            "activation": "swiglu",
            "bias": False,
            "attention_multiplier": 0.125,
            "d_model": 256,
            "embedding_multiplier": 1.0,
            "ffn_bias": False,
            "hidden_activation": "silu",
            "is_moe": False,
            "kv_channels": 64,
            "logits_scaling": 1,
            "n_head": 4,
            "n_head_kv": 2,
            "n_inner": 192,
            "n_layer": 2,
            "norm_type": "rmsnorm",
            "num_experts": 0,
            "residual_multiplier": 1.0,
            "qkv_bias": False,
            "rotary_pct": 1.0,
            "tie_embeddings": False,
            "use_alibi": False,
            "use_parallel_residual": False,
            "use_rmsnorm": True,
        },
        {
            "activation": "geglu",
            "bias": True,
            "attention_multiplier": 1.0,
            "d_model": 128,
            "embedding_multiplier": 12.0,
            "ffn_bias": True,
            "hidden_activation": "gelu",
            "is_moe": True,
            "kv_channels": 32,
            "logits_scaling": 8.0,
            "n_head": 8,
            "n_head_kv": 4,
            "n_inner": 96,
            "n_layer": 3,
            "norm_type": "layernorm",
            "num_experts": 8,
            "residual_multiplier": 0.5,
            "qkv_bias": True,
            "rotary_pct": 0.5,
            "tie_embeddings": True,
            "use_alibi": True,
            "use_parallel_residual": True,
            "use_rmsnorm": False,
        },
    ),
    "llama-biased": ({"bias": True, "use_bias": True}, {"bias": False, "use_bias": False}),
    # q, k and v alone have biases: "bias" says nothing.
    "qwen2": ({"qkv_bias": True}, {"qkv_bias": False, "bias": False, "use_bias": True}),
    "nemotron": (
        {"rope_percent": 0.5, "rotary_dim": 32, "use_gated_activation": False},
        {"rope_percent": 1.0, "rotary_dim": 64, "use_gated_activation": True},
    ),
    "phi": (
        {"qk_layernorm": False, "use_parallel_residual": True, "norm_type": "layer_norm"},
        {"qk_layernorm": True, "use_parallel_residual": False, "norm_type": "rms_norm"},
    ),
    "gpt2": ({"ffn_dim": 192, "hidden_act": "gelu_new"}, {"ffn_dim": 96, "hidden_act": "relu"}),
    "mixtral": ({"use_moe": True}, {"use_moe": False, "n_routed_experts": 0}),
    "cohere2": ({"rotary_pct": 1.0}, {"rotary_pct": 0.5}),
    "opt": (
        {"learned_embeddings": True, "scale_embeddings": False},
        {"learned_embeddings": False, "scale_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", [name for name in RESTATED if name in TINY])
def test_a_key_that_says_once_more_what_is_computed_must_be_right(name):
    agrees, contradicts = RESTATED[name]
    config = tiny_config(name).to_dict()
    assert read_config(config | agrees) == read_config(config)
    for key, value in contradicts.items():
        with pytest.raises(ModelError, match=rf"{key} = {value!r} is (not supported|unknown)"):
            read_config(config | {key: value})


def test_notes_of_training_and_of_libraries_change_nothing():
    notes = {
        "aux_loss_alpha": 0.001,
        "embd_dropout": 0.1,
        "ffn_dropout_rate": 0.1,
        "freeze_lm_head": False,
        "generation_config": {"top_k": 5},
        "init_method": "mup",
        "initializer_factor": 1.0,
        "lora_alpha": 16,
        "mergekit_version": "0.1",
        "moe_aux_loss_coeff": 0.01,
        "router_z_loss_coef": 0.001,
        "sliding_window": 64,
        "tokenizer_revision": "x",
        "trust_remote_code": True,
        "use_fused_rms_norm": True,
        "use_sliding_window": False,
    }
    for name in ("llama", "phi3", "gpt2"):
        config = tiny_config(name).to_dict()
        more = {key: value for key, value in notes.items() if key not in config}
        assert read_config(config | more) == read_config(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, "attention in chunks of long texts"),
        ({"quantization": {"bits": 4}}, "weights as MLX quantizes them; take the floating"),
    ],
)
def test_a_known_key_that_changes_the_model_is_refused_with_its_reason(change, says):
    with pytest.raises(ModelError, match=rf"{next(iter(change))} = .* asks for {says}"):
        read_config(tiny_config("qwen2").to_dict() | change)


def test_a_factor_of_yarn_that_engines_read_in_two_ways():
    """DeepSeek-R1-0528-Qwen3-8B; Yarn-Llama-2 and Yarn-Mistral hold the constants."""
    config = tiny_config("qwen3").to_dict()
    config.pop("rope_parameters")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    plain = read_config(config | {"rope_scaling": yarn})
    same = {"attn_factor": 1.0, "extrapolation_factor": 1, "finetuned": True}
    assert read_config(config | {"rope_scaling": yarn | same}) == plain
    factor = 1 / (0.1 * math.log(4) + 1)
    for entries, says in (
        ({"attn_factor": factor}, r"write attention_factor in its place: 1 with it, 1\.13863 with"),
        ({"extrapolation_factor": 2.0}, r"extrapolation_factor = 2\.0 is not supported"),
    ):
        with pytest.raises(ModelError, match=says):
            read_config(config | {"rope_scaling": yarn | entries})
