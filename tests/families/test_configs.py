"""Every family: what transformers 4 and 5 write is read into what the model computes."""

import pytest
from transformers import LlamaForCausalLM

from quatom.errors import ModelError
from quatom.families.decoder import NORMS_BEFORE
from quatom.families.registry import read_config
from tests.families.models import COMMON, TINY, tiny_config, tiny_model

REQUIRED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
    "n_head",
    "num_layers",
    "num_heads",
    "attention_types",
}
# Quatom takes no token to end a text from a default: config.json or generation_config.json says it.
TOKENS = {"bos_token_id", "eos_token_id"}
VERSION_4 = {
    "_name_or_path": "models/x",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "is_decoder": False,
    "num_beams": 1,
    "pruned_heads": {},
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "4.44.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def version_4(config: dict) -> dict:
    """The same config as transformers 4 wrote it."""
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")} | VERSION_4
    rope = config.get("rope_parameters")
    if rope is None:
        return old
    if config["model_type"] == "mellum":  # which transformers 4 does not know
        return config
    if "full_attention" in rope:
        local = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        if config["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = local
    scaling = dict(rope)
    old["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if config["model_type"] == "gpt_neox":
        old["rotary_emb_base"], old["rotary_pct"] = (
            old.pop("rope_theta"),
            old.pop("partial_rotary_factor"),
        )
    # Families with a rotary embedding per layer type are young: they have no "type".
    spelling = "rope_type" if "full_attention" in config["rope_parameters"] else "type"
    scaling[spelling] = scaling.pop("rope_type")
    old["rope_scaling"] = None if scaling == {spelling: "default"} else scaling
    return old


def outcome(config: dict):
    """What is read, or why not: 2 query heads do not share a default of 32 KV heads."""
    try:
        return read_config(config)
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize("name", TINY)
def test_both_versions_and_files_of_differences_say_the_same(name):
    written = tiny_config(name)
    config = read_config(written.to_dict())
    assert read_config(written.to_diff_dict()) == config
    assert read_config(version_4(written.to_dict())) == config
    # What the installed transformers makes of the old form, too.
    again = type(written)(**version_4(written.to_dict()))
    assert read_config(again.to_dict()) == config


@pytest.mark.parametrize("name", TINY)
def test_a_missing_key_takes_the_default_of_transformers(name):
    written = tiny_config(name).to_dict()
    for key in written.keys() - REQUIRED - TOKENS:
        rest = {k: v for k, v in written.items() if k != key}
        theirs = type(tiny_config(name))(**rest).to_dict()
        assert outcome(rest) == outcome(theirs), key


@pytest.mark.parametrize("name", TINY)
def test_every_default_of_the_class(name):
    kind = type(tiny_config(name))
    sizes = {k: v for k, v in kind().to_dict().items() if k in REQUIRED | {"model_type"}}
    # Of sizes that do not fit each other (GLM-4.5's), the error.
    assert outcome(sizes | dict.fromkeys(TOKENS)) == outcome(
        kind().to_dict() | dict.fromkeys(TOKENS)
    )


@pytest.mark.parametrize("name", TINY)
def test_constants_are_those_of_the_modules(name):
    model = tiny_model(name)
    config = read_config(model.config.to_dict())
    base = model.base_model
    decoder = getattr(base, "decoder", base)
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    for layer, theirs in zip(config.layers, layers, strict=True):
        attention = layer.attention
        names = ("attn", "attention", "self_attn", "self_attention")
        module = next(getattr(theirs, name) for name in names if hasattr(theirs, name))
        module = getattr(module, "attention", module)  # GPT-Neo's, of one kind or another
        names = ("scaling", "inv_norm_factor")  # GPT-J of transformers 5.17 has neither
        scale = next((getattr(module, n) for n in names if hasattr(module, n)), attention.scale)
        assert attention.scale == pytest.approx(scale, rel=1e-15)
        assert attention.head_dim == getattr(module, "head_dim", getattr(module, "head_size", 0))
        names = NORMS_BEFORE if isinstance(model, LlamaForCausalLM) else layer.norm_names
        norms = {place: theirs.get_submodule(names[place]) for place in layer.norms}
        if name != "olmo":  # whose eps is in the code of the module
            eps = {getattr(n, "variance_epsilon", getattr(n, "eps", None)) for n in norms.values()}
            assert eps == {norm.eps for norm in layer.norms.values()}
        kinds = {"rms" if "RMS" in type(n).__name__ else "layer" for n in norms.values()}
        assert kinds == {norm.kind for norm in layer.norms.values()}
    assert config.num_layers == len(layers)
    assert config.max_position >= model.config.max_position_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (256, (257,))


WINDOWS = {
    "mistral": [24, 24],
    "ministral": [20, None, 20, None],
    "cohere2": [20, None, 20, None],
    "qwen2-windows": [None, 16, 16],
    "gemma2": [32, None, 32, None],
    "exaone4": [22, None, 22, None],
    "vaultgemma": [26, None, 26],
    "cwm": [None, 20, 20, 20, None],
    "gemma3": [24, 24, 24, None],
    "phi3": [28, 28],
    "gpt_neo": [None, 20, 20],
    "olmo3": [12, 12, 12, None],
    "granite_swa": [None, 21, 21, 21],
    "granitemoe_swa": [None, 17, 17, 17],
    "smollm3": [None, 30, None, 30],
    "starcoder2": [36, 36],
    "mixtral": [24, 24],
    "phimoe": [40, 40],
    "gpt_oss": [18, None],
    "dots1": [None, None, 26],
    "exaone_moe": [22, None, 22, None],
    "mellum": [14, None, 14],
}


@pytest.mark.parametrize("name", TINY)
def test_windows(name):
    config = read_config(tiny_config(name).to_dict())
    windows = [layer.attention.window for layer in config.layers]
    assert windows == WINDOWS.get(name, [None] * config.num_layers)


def test_a_window_as_long_as_the_model_is_none():
    keys = tiny_config("mistral").to_dict() | {"sliding_window": COMMON["max_position_embeddings"]}
    assert read_config(keys).layers[0].attention.window is None


def test_gemma2_and_gemma3():
    two = read_config(tiny_config("gemma2").to_dict())
    three = read_config(tiny_config("gemma3").to_dict())
    assert two.embedding_multiplier == three.embedding_multiplier == 8.0
    assert (two.layers[0].attention.logit_softcap, two.logit_softcap) == (5.0, 3.0)
    assert (three.layers[0].attention.logit_softcap, three.logit_softcap) == (None, None)
    assert two.layers[0].attention.scale == 1 / 12
    assert two.final_norm.weight_offset == 1.0
    assert three.layers[0].attention.qk_norm == three.final_norm
    assert [rope.theta for rope in three.ropes()] == [1e4, 1e6]
    assert (two.tie_word_embeddings, two.layers[0].feed_forward.activation) == (True, "gelu_tanh")


def test_granite_has_four_multipliers():
    config = read_config(tiny_config("granite").to_dict())
    assert (config.embedding_multiplier, config.logits_divisor) == (12.0, 8.0)
    assert config.layers[1].residual_multiplier == 0.22
    assert config.layers[1].attention.scale == 0.03


def test_hyperclovax_multiplies_logits():
    config = read_config(tiny_config("hyperclovax").to_dict())
    assert (config.embedding_multiplier, config.logits_divisor) == (10.0, 8.0)
    assert config.layers[0].norm_names["attention_output"] == "post_norm1"
    plain = read_config(tiny_config("hyperclovax", use_post_norm=False).to_dict())
    assert list(plain.layers[0].norms) == ["attention", "feed_forward"]


def test_granite_with_windows_has_a_rotary_base_per_layer():
    config = read_config(tiny_config("granite_swa").to_dict())
    thetas = [rope and rope.theta for rope in (x.attention.rope for x in config.layers)]
    assert thetas == [1e4, None, 1e4, 5e5]
    assert all(layer.attention.sinks for layer in config.layers)
    for wrong in ([1e4] * 3, [1e4, 1e4, 1e4, -1.0], []):
        with pytest.raises(ModelError, match="layer_rope_theta must list 4 numbers"):
            read_config(tiny_config("granite_swa").to_dict() | {"layer_rope_theta": wrong})


def test_smollm3_turns_no_heads_in_some_layers():
    config = read_config(tiny_config("smollm3").to_dict())
    assert [layer.attention.rope is not None for layer in config.layers] == [True, False] * 2


def test_exaone4_turns_heads_where_it_has_windows_or_has_none_at_all():
    config = tiny_config("exaone4").to_dict()
    turns = [layer.attention.rope is not None for layer in read_config(config).layers]
    assert turns == [True, False] * 2
    without = config | {"sliding_window": None, "layer_types": ["full_attention"] * 4}
    assert all(layer.attention.rope for layer in read_config(without).layers)
    letters = {name: value for name, value in config.items() if name != "layer_types"}
    with pytest.raises(ModelError, match=r"sliding_window_pattern = 'LLLG'.*write layer_types"):
        read_config(letters | {"sliding_window_pattern": "LLLG"})


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_the_first_gemma_means_the_tanh_approximation(name):
    config = tiny_config("gemma").to_dict() | {"hidden_act": name, "hidden_activation": None}
    assert read_config(config).layers[0].feed_forward.activation == "gelu_tanh"
    with pytest.raises(ModelError, match="hidden_activation = 'gelu' is not supported"):
        read_config(config | {"hidden_activation": "gelu"})


@pytest.mark.parametrize("name", ["nemotron", "arcee"])
def test_squared_relu_without_a_gate(name):
    feed_forward = read_config(tiny_config(name).to_dict()).layers[0].feed_forward
    assert (feed_forward.activation, feed_forward.gated) == ("relu2", False)


def test_nemotron_stores_norm_weights_less_one():
    norm = read_config(tiny_config("nemotron").to_dict()).final_norm
    assert (norm.kind, norm.weight_offset, norm.bias) == ("layer", 1.0, True)


def test_families_without_a_gate():
    opt = read_config(tiny_config("opt").to_dict())
    coder = read_config(tiny_config("starcoder2").to_dict())
    assert not opt.layers[0].feed_forward.gated
    assert not coder.layers[0].feed_forward.gated
    assert opt.layers[0].feed_forward.activation == "relu"
    assert coder.layers[0].feed_forward.activation == "gelu_tanh"
    assert (opt.positions.offset, opt.max_position) == (2, 512)


def test_partial_and_interleaved_rotary_embedding():
    for name, dim, interleaved in [
        ("glm", 32, True),
        ("glm4", 64, True),
        ("stablelm", 20, False),
        ("nemotron", 32, False),
        ("phi3-partial", 96, False),
    ]:
        rope = read_config(tiny_config(name).to_dict()).layers[0].attention.rope
        assert (rope.dim, rope.interleaved) == (dim, interleaved), name


def test_norms_of_all_heads_and_of_each():
    olmo = read_config(tiny_config("olmo2").to_dict()).layers[0].attention
    qwen = read_config(tiny_config("qwen3").to_dict()).layers[0].attention
    assert (olmo.qk_norm_axis, qwen.qk_norm_axis) == ("all", "head")
    for name in ("cohere", "stablelm"):
        heads = read_config(tiny_config(f"{name}-norms").to_dict()).layers[0].attention
        assert (heads.qk_norm.kind, heads.qk_norm.bias, heads.qk_norm_axis) == (
            "layer",
            False,
            "each",
        )
        plain = read_config(tiny_config(name).to_dict()).layers[0].attention
        assert plain.qk_norm is None
    assert olmo.qk_norm.weight_offset == qwen.qk_norm.weight_offset == 0.0
