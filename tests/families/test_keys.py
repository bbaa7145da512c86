"""Keys: types, spellings, nulls, and the refusal of what nobody read."""

import pytest

from quatom.errors import ModelError
from quatom.families.keys import Keys, eos_tokens


def test_types_are_strict():
    keys = Keys({"bool": True, "float": 2.0, "int": 2, "text": "2", "nan": float("nan")})
    assert keys.integer("int") == 2
    assert (keys.number("int"), keys.number("float")) == (2.0, 2.0)
    assert keys.flag("bool") is True
    assert keys.text("text", default="") == "2"
    for name in ("bool", "float", "text", "nan"):
        with pytest.raises(ModelError, match=rf"{name} must be a positive integer, got"):
            keys.integer(name)
    for name in ("bool", "text", "nan"):
        with pytest.raises(ModelError, match=rf"{name} must be a number, got"):
            keys.number(name)
    with pytest.raises(ModelError, match=r"int must be true or false, got 2"):
        keys.flag("int")
    with pytest.raises(ModelError, match=r"int must be a string, got 2"):
        keys.text("int", default="")


@pytest.mark.parametrize("value", [0, -1, 0.0])
def test_nothing_below_one(value):
    with pytest.raises(ModelError, match=r"n must be a positive (integer|number), got"):
        Keys({"n": value}).integer("n")
    with pytest.raises(ModelError, match=r"n must be a positive number, got"):
        Keys({"n": value}).positive("n")


def test_an_integer_that_no_float_holds():
    with pytest.raises(ModelError, match=r"n must be a number"):
        Keys({"n": 10**400}).number("n")


def test_missing_keys():
    keys = Keys({"null": None})
    for name in ("null", "missing"):
        assert keys.integer(name, default=3) == 3
        assert keys.number(name, default=0.5) == 0.5
        with pytest.raises(ModelError, match=rf"{name} must be a positive integer, got None"):
            keys.integer(name)
    # The methods that know a difference between null and nothing.
    assert keys.integer_or_none("null", default=3) is None
    assert keys.integer_or_none("missing", default=3) == 3
    assert keys.number_or_none("null", default=0.5) is None
    assert keys.number_or_none("missing", default=0.5) == 0.5


def test_two_spellings_of_one_key():
    assert Keys({"new": 2}).integer("new", "old") == 2
    assert Keys({"old": 2}).integer("new", "old") == 2
    assert Keys({"new": None, "old": 2}).integer("new", "old") == 2
    assert Keys({"new": 2, "old": 2.0}).integer("new", "old") == 2
    with pytest.raises(ModelError, match=r"new = 2 and old = 3 contradict each other; keep"):
        Keys({"new": 2, "old": 3}).integer("new", "old")
    with pytest.raises(ModelError, match=r"new = 1 and old = True contradict"):
        Keys({"new": 1, "old": True}).value("new", "old")


def test_rotary_sections_are_read_by_dotted_names():
    keys = Keys(
        {"rope_parameters": {"full_attention": {"rope_theta": 5}}, "rope_scaling": {"factor": 2}}
    )
    assert keys.number("rope_parameters.full_attention.rope_theta") == 5.0
    assert keys.number("rope_parameters.factor", "rope_scaling.factor") == 2.0
    keys.finish()
    # An empty new section does not hide a filled old one.
    keys = Keys({"rope_parameters": {}, "rope_scaling": {"factor": 2}})
    assert keys.number("rope_parameters.factor", "rope_scaling.factor") == 2.0


def test_what_nobody_read_is_refused_by_name():
    keys = Keys({"read": 1, "null": None, "vocab_file": "x", "_note": 3, "unsloth_version": "4"})
    keys.integer("read")
    keys.finish()
    with pytest.raises(ModelError, match=r"config key beta = 0\.5 is unknown.*remove from"):
        Keys({"beta": 0.5}).finish()
    with pytest.raises(ModelError, match=r"config keys beta = 0\.5, rope_scaling\.c = 1 are"):
        Keys({"beta": 0.5, "rope_scaling": {"c": 1}}).finish()


def test_messages_stay_on_one_short_line():
    with pytest.raises(ModelError) as caught:
        Keys({"table": ["a\nb"] * 10_000, "text": "x\n" * 10_000}).finish()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_neutral_values():
    Keys({"is_causal": True, "pruned_heads": {}, "mlp_bias": False}).finish()
    with pytest.raises(ModelError, match=r"is_causal = False is not supported.*only True is"):
        Keys({"is_causal": False}).finish()
    with pytest.raises(ModelError, match=r"mlp_bias = True is not supported.*only False is"):
        Keys({"mlp_bias": True}).finish()


def test_lists_with_an_entry_per_layer():
    keys = Keys({"good": [0, 1], "long": [0, 1, 1], "other": [0, 2], "text": "01"})
    assert keys.per_layer("good", 2, 0, 1) == (0, 1)
    assert keys.per_layer("missing", 2, 0, 1) is None
    for name, message in [
        ("long", r"a list of 2 entries, one per layer, got"),
        ("text", r"a list of 2 entries"),
        ("other", r"other has the entry 2, which is not supported; supported: 0, 1"),
    ]:
        with pytest.raises(ModelError, match=message):
            keys.per_layer(name, 2, 0, 1)


def test_tokens():
    assert (eos_tokens(None), eos_tokens(2), eos_tokens([2, 3])) == ((), (2,), (2, 3))
    for value in ("2", [2.0], True):
        with pytest.raises(ModelError, match=r"eos_token_id must be an integer or a list"):
            eos_tokens(value)
    assert Keys({"bos_token_id": 1}).token("bos_token_id") == 1
    with pytest.raises(ModelError, match=r"bos_token_id must be one integer or null"):
        Keys({"bos_token_id": [1, 2]}).token("bos_token_id")


@pytest.mark.parametrize("config", [[], "x", None])
def test_a_config_that_is_no_object(config):
    with pytest.raises(ModelError, match=r"config.json must hold an object"):
        Keys(config)
    with pytest.raises(ModelError, match=r"rope_scaling must be an object or null, got 'x'"):
        Keys({"rope_scaling": "x"})


def test_every_generation_setting_of_transformers_is_harmless():
    from transformers import GenerationConfig

    settings = GenerationConfig().to_dict().keys() - {"bos_token_id", "eos_token_id"}
    Keys(dict.fromkeys(settings, "any value")).finish()
