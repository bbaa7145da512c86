"""Popular models that do not run are refused by one line that says what they have."""

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from quatom.checkpoint.language_part import language_part
from quatom.errors import ModelError
from quatom.families.refused import REFUSED
from quatom.families.registry import FAMILIES, read_config

REMOTE = {
    *("kimi_k2", "KimiK25ForConditionalGeneration", "internlm2", "InternLM2ForCausalLM"),
    *("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM", "MPTForCausalLM"),
}
"""Names of code that is not in transformers."""


def test_names_are_those_of_transformers_and_of_no_family():
    types = {name for name in REFUSED if name in CONFIG_MAPPING_NAMES}
    classes = {name for name in REFUSED if hasattr(transformers, name)}
    assert REFUSED.keys() - types - classes == REMOTE
    ours = {name for f in FAMILIES for name in (f.model_type, *f.architectures)}
    assert not ours & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_one_line(name):
    for config in (
        {"architectures": [name]},
        {"architectures": name, "model_type": None},
        {"model_type": name, "hidden_size": "whatever"},
        {"architectures": ["SomeModel"], "text_config": {"model_type": name}},
    ):
        with pytest.raises(ModelError) as caught:
            read_config(config)
        message = str(caught.value)
        assert message.startswith(f"{name} is not supported: it has {REFUSED[name]}; ")
        assert "\n" not in message


def test_the_language_part_of_a_larger_model_has_a_reason_too(tmp_path):
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral4"},
    }
    with pytest.raises(ModelError, match=r"mistral4 is not supported: it has .*\(MLA\)"):
        language_part(tmp_path, config)
