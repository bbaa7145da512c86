"""Rotary parameters of config.json: every kind and spelling, and what is refused."""

import math

import pytest

from quatom.errors import ModelError
from quatom.families.registry import read_config
from quatom.families.spec import Rope, RopeScaling

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2] * 8}


def named(name: str, **keys) -> dict:
    return BASE | {"architectures": [name], "model_type": None} | keys


def rope_of(**keys) -> Rope:
    (rope,) = read_config(BASE | keys).ropes()
    return rope


def scaling_of(**entries) -> RopeScaling:
    return rope_of(rope_scaling=entries).scaling


def test_theta():
    assert rope_of() == Rope(theta=1e4, dim=16)
    assert rope_of(rope_theta=1_000_000) == Rope(theta=1e6, dim=16)
    assert rope_of(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).theta == 5e5
    assert rope_of(rope_parameters={}, rope_theta=5e5, rope_scaling=None).theta == 5e5


def test_both_generations_say_the_same():
    old = rope_of(rope_theta=5e5, rope_scaling=LLAMA3)
    assert rope_of(rope_parameters=LLAMA3 | {"rope_theta": 5e5}) == old
    assert rope_of(rope_parameters={}, rope_theta=5e5, rope_scaling=LLAMA3) == old
    both = LLAMA3 | {"rope_theta": 5e5}
    assert rope_of(rope_parameters=both, rope_theta=5e5, rope_scaling=LLAMA3) == old
    assert old.scaling == RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=256,
    )


def test_linear_and_dynamic():
    assert scaling_of(type="linear", factor=2) == RopeScaling(kind="linear", factor=2.0)
    assert scaling_of(rope_type="dynamic", factor=2.0) == RopeScaling(
        kind="dynamic", factor=2.0, original_max_position=512
    )


def test_yarn():
    found = scaling_of(type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert found == RopeScaling(
        kind="yarn",
        factor=4.0,
        original_max_position=128,
        attention_factor=0.1 * math.log(4) + 1,
    )
    assert scaling_of(type="yarn", factor=4.0).original_max_position == 512
    # factor null: what the two lengths say
    assert scaling_of(type="yarn", factor=None, original_max_position_embeddings=128).factor == 4.0
    assert scaling_of(type="yarn", factor=4.0, attention_factor=0.5).attention_factor == 0.5
    both = scaling_of(type="yarn", factor=40, mscale=0.707, mscale_all_dim=1.0)
    assert both.attention_factor == pytest.approx(
        (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1), rel=1e-15
    )
    # One of the two alone has no effect in transformers.
    alone = scaling_of(type="yarn", factor=40, mscale=0.707)
    assert alone.attention_factor == 0.1 * math.log(40) + 1
    more = scaling_of(type="yarn", factor=4.0, beta_fast=16, beta_slow=2, truncate=False)
    assert (more.beta_fast, more.beta_slow, more.truncate) == (16.0, 2.0, False)


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope(kind):
    found = scaling_of(type=kind, original_max_position_embeddings=128, **LONGROPE)
    assert found == RopeScaling(
        kind="longrope",
        factor=4.0,
        original_max_position=128,
        attention_factor=math.sqrt(1 + math.log(4) / math.log(128)),
        short_factors=(1.0,) * 8,
        long_factors=(2.0,) * 8,
    )
    # Without a pre-training length, it is the model's own.
    assert scaling_of(type=kind, **LONGROPE).attention_factor == 1.0


def test_phi3_calls_longrope_yarn_and_has_its_own_pre_training_length():
    keys = {"rope_scaling": {"type": "yarn", **LONGROPE}, "max_position_embeddings": 8192}
    (rope,) = read_config(named("Phi3ForCausalLM", **keys)).ropes()
    assert (rope.scaling.kind, rope.scaling.original_max_position) == ("longrope", 4096)
    keys["rope_scaling"]["original_max_position_embeddings"] = 2048
    with pytest.raises(ModelError, match=r"original_max_position_embeddings = 2048.*only 4096 is"):
        read_config(named("Phi3ForCausalLM", **keys))


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rotary_pct", "rope_pct"])
def test_partial_rotary_embedding(key):
    name = "StableLmForCausalLM"
    (rope,) = read_config(named(name, **{key: 0.5})).ropes()
    assert rope.dim == 8
    (rope,) = read_config(named(name)).ropes()
    assert rope.dim == 4
    (rope,) = read_config(named(name, rope_parameters={"partial_rotary_factor": 1.0})).ropes()
    assert rope.dim == 16
    both = {key: 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}}
    with pytest.raises(ModelError, match=r"partial_rotary_factor = 0.75 and .* contradict"):
        read_config(named(name, **both))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        # Keys in the cache would have been turned by other frequencies.
        ({"type": "dynamic", "factor": 4.0}, 512),
        ({"type": "yarn", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        (LLAMA3, 512),
        ({"type": "longrope", **LONGROPE, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_the_longest_sequence(scaling, longest):
    assert read_config(BASE | {"rope_scaling": scaling}).max_position == longest


def test_gemma3_has_two_tables_and_counts_scaling_in_its_length():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = named("Gemma3ForCausalLM", rope_theta=2e6, rope_scaling=scaling, sliding_window=64)
    config = read_config(old | {"rope_local_base_freq": 3e4, "sliding_window_pattern": 2})
    near = Rope(theta=3e4, dim=256)
    far = Rope(theta=2e6, dim=256, scaling=RopeScaling(kind="linear", factor=8.0))
    assert [layer.attention.rope for layer in config.layers] == [near, far, near, far]
    assert config.max_position == 512
    new = named(
        "Gemma3ForCausalLM",
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": scaling | {"rope_theta": 2e6},
            "sliding_attention": {"rope_theta": 3e4},
        },
    )
    assert read_config(new) == config


def test_olmo3_scales_full_attention_alone():
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    config = read_config(named("Olmo3ForCausalLM", rope_theta=500000, rope_scaling=scaling))
    kinds = [layer.attention.rope.scaling is not None for layer in config.layers]
    assert kinds == [False, False, False, True]


REFUSED = {
    "unknown kind": ({"type": "ntk"}, "rope_scaling.type = 'ntk' is not supported; supported: def"),
    "kind as number": ({"type": 3}, "rope_scaling.type must be a string"),
    "mrope": ({"type": "mrope", "mrope_section": [8, 4, 4]}, "rope_scaling.type = 'mrope'"),
    "mrope's sections": ({"rope_type": "default", "mrope_section": [8]}, "mrope_section = .8. is"),
    "two kinds": ({"type": "yarn", "rope_type": "linear", "factor": 2}, "contradict each other"),
    "no factor": ({"type": "linear"}, "factor must be a number, got None"),
    "factor as text": ({"type": "linear", "factor": "2"}, "rope_scaling.factor must be a number"),
    "negative factor": ({"type": "linear", "factor": -2}, "must be a positive number, got -2.0"),
    "another entry": ({"type": "linear", "factor": 2, "beta": 1}, "rope_scaling.beta = 1 is unkn"),
    "factors": (LLAMA3 | {"high_freq_factor": 1.0}, "must be above low_freq_factor 1.0"),
    "few factors": (
        {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8},
        "needs 8 short and long factors.* has 1 and 8",
    ),
    "no factors": ({"type": "su"}, "short_factor must be a list of numbers"),
    "partial": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "factor = 0.5"),
    "attention": ({"type": "yarn", "factor": 2, "attention_factor": 0}, "attention_factor must"),
    "length": (
        {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1},
        "must be an integer of at least 2, got 1",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rotary_parameters_that_are_refused(reason):
    scaling, message = REFUSED[reason]
    with pytest.raises(ModelError, match=message) as caught:
        read_config(BASE | {"rope_scaling": scaling})
    assert "\n" not in str(caught.value)


def test_contradicting_places():
    with pytest.raises(ModelError, match=r"rope_parameters.rope_theta = 5.0 and rope_theta = 6.0"):
        rope_of(rope_theta=6.0, rope_parameters={"rope_theta": 5.0})
    with pytest.raises(ModelError, match=r"rope_type = 'default' and rope_scaling.type = 'linear'"):
        rope_of(
            rope_parameters={"rope_type": "default"},
            rope_scaling={"type": "linear", "factor": 2.0},
        )


def test_one_set_or_one_per_layer_type():
    nested = {"full_attention": {"rope_theta": 1e5}}
    with pytest.raises(ModelError, match=r"full_attention.rope_theta = 100000.0: this family has"):
        rope_of(rope_parameters=nested)
    with pytest.raises(ModelError, match=r"rope_parameters.rope_theta = 100000.0 is unknown"):
        read_config(named("Gemma3ForCausalLM", rope_parameters={"rope_theta": 1e5}))
    entries = nested | {"full_attention": {"rope_type": "yarn", "factor": 2, "truncate": False}}
    with pytest.raises(ModelError, match=r"truncate = False is not supported"):
        read_config(named("Olmo3ForCausalLM", rope_parameters=entries))
