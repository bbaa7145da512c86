"""Keys of released config.json files that the classes of transformers do not have."""

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
