"""A Hugging Face config.json turned into the fields of `ModelConfig`.

Only what is understood is accepted. Every key of config.json is either read, listed in `_HARMLESS`
(it cannot change the logits of a forward pass), required to have the value that means "off", or
refused by name: an unknown key that changes the mathematics would give a model that runs and is
wrong.
"""

from collections.abc import Mapping
from typing import Any

from quatom.errors import ModelError
from quatom.modeling.config import Architecture, RopeScaling

_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}

# Keys that no forward pass of a decoder at inference depends on. quantization_config is judged by
# the checkpoint reader, which knows the formats.
_HARMLESS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    attention_dropout bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range
    is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_cache
"""

# Keys that may be present with a value that switches them off, and with no other.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "cross_attention_hidden_size": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    "qk_norm": (False, None),
    "rope_interleaved": (False, None),
    "tie_encoder_decoder": (False, None),
    "torchscript": (False, None),
    "use_bfloat16": (False, None),
    "use_mrope": (False, None),
    "use_qk_norm": (False, None),
}

_READ = """
    architectures attention_bias bos_token_id eos_token_id head_dim hidden_size
    intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias
    model_type num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings
    use_sliding_window vocab_size
"""


def read_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`, from a config.json as transformers 4 or 5 writes it.

    Raises:
        ModelError: as `ModelConfig.from_hf` says.
    """
    architecture = _architecture(config)
    _refuse_unknown(config)
    theta, scaling = _rope(config)
    num_layers = _integer(config, "num_hidden_layers")
    num_heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ModelError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                f"{num_heads} and config.json has no head_dim; add it"
            )
        head_dim = hidden_size // num_heads
    attention_bias = _flag(config, "attention_bias")
    qwen2 = architecture == "qwen2"
    if qwen2 and ("attention_bias" in config or "mlp_bias" in config):
        raise ModelError(
            "config key attention_bias or mlp_bias has no meaning for qwen2, whose q, k and v "
            "always have biases and whose other linears never do; remove it"
        )
    return dict(
        architecture=architecture,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=_integer(config, "max_position_embeddings"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=_flag(config, "mlp_bias"),
        sliding_window=_sliding_window(config, architecture, num_layers),
        bos_token_id=_optional_token(config, "bos_token_id"),
        eos_token_ids=eos_tokens(config.get("eos_token_id")),
    )


def eos_tokens(value: Any) -> tuple[int, ...]:
    """The tokens of an eos_token_id entry: an integer, a list of them, or null.

    Raises:
        ModelError: it is something else.
    """
    tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ModelError(f"eos_token_id must be an integer or a list of integers, got {value!r}")
    return tokens


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    supported = ", ".join(_ARCHITECTURES)
    if names:
        if len(names) != 1 or names[0] not in _ARCHITECTURES:
            raise ModelError(f"architectures {names} is not supported; supported: {supported}")
        if model_type not in (None, _ARCHITECTURES[names[0]]):
            raise ModelError(
                f"model_type {model_type!r} contradicts architectures {names}; expected "
                f"{_ARCHITECTURES[names[0]]!r}"
            )
        return _ARCHITECTURES[names[0]]
    for architecture in _ARCHITECTURES.values():
        if model_type == architecture:
            return architecture
    raise ModelError(
        f"model_type {model_type!r} is not supported and config.json names no architectures; "
        f"supported: {supported}"
    )


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    known = {*_READ.split(), *_HARMLESS.split()}
    for key, value in config.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                allowed = " or ".join(repr(v) for v in _ONLY[key] if v is not None) or "null"
                raise ModelError(
                    f"config key {key} = {value!r} is not supported; only {allowed} is"
                )
        elif key not in known and value is not None:
            raise ModelError(
                f"config key {key} = {value!r} is unknown to Quatom and may change what the model "
                "computes; remove it from config.json if it has no effect on inference"
            )


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config key {key} must be a positive integer, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"config key {key} must be a number, got {value!r}")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (True, False, None):
        raise ModelError(f"config key {key} must be true or false, got {value!r}")
    return bool(value)


def _optional_token(config: Mapping[str, Any], key: str) -> int | None:
    tokens = eos_tokens(config.get(key))
    if len(tokens) > 1:
        raise ModelError(f"config key {key} must be one integer or null, got {config[key]!r}")
    return tokens[0] if tokens else None


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    # transformers 4 uses 10000 where config.json has no rope_theta.
    theta = _number(config, "rope_theta", 10000.0)
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key)
    if rope is None:
        return theta, None
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise ModelError(
            f"config key {key} = {rope!r} is not supported; one set of rotary parameters for all "
            "layers is"
        )
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    theta = _number(rope, "rope_theta", theta)
    fraction = rope.pop("partial_rotary_factor", 1.0)
    if fraction not in (1.0, None):
        raise ModelError(
            f"config key {key}.partial_rotary_factor = {fraction!r} is not supported; only 1.0 is"
        )
    rope.pop("rope_theta", None)
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in keys:
        raise ModelError(
            f"config key {key}.rope_type = {kind!r} is not supported; supported: {', '.join(keys)}"
        )
    # transformers 5 also notes the pre-training length where the type does not use it.
    unknown = set(rope) - set(keys[kind]) - {"original_max_position_embeddings"}
    if unknown := {name for name in unknown if rope[name] is not None}:
        raise ModelError(
            f"config key {key} has unknown entries {sorted(unknown)} for rope_type {kind!r}; "
            f"known: {', '.join(keys[kind]) or 'none'}"
        )
    values = {name: _number(rope, name) for name in keys[kind]}
    if any(value <= 0.0 for value in values.values()):
        raise ModelError(f"config key {key} must have positive entries, got {values}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=values["factor"])
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ModelError(
            f"config key {key}: high_freq_factor {values['high_freq_factor']} must be above "
            f"low_freq_factor {values['low_freq_factor']}"
        )
    return theta, RopeScaling(
        kind="llama3",
        factor=values["factor"],
        low_freq_factor=values["low_freq_factor"],
        high_freq_factor=values["high_freq_factor"],
        original_max_position=int(values["original_max_position_embeddings"]),
    )


def _sliding_window(
    config: Mapping[str, Any], architecture: Architecture, num_layers: int
) -> int | None:
    """The window of all layers. Layers of different kinds in one model are refused."""
    window = config.get("sliding_window")
    if architecture == "llama" or not _flag(config, "use_sliding_window"):
        if architecture == "llama" and window is not None:
            raise ModelError(f"config key sliding_window = {window!r} is not supported for llama")
        window = None
    layer_types = config.get("layer_types")
    if layer_types is None:
        # transformers applies the window from layer max_window_layers on.
        full = (
            num_layers if window is None else min(config.get("max_window_layers", 28), num_layers)
        )
        layer_types = ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
    if len(layer_types) != num_layers or not set(layer_types) <= {
        "full_attention",
        "sliding_attention",
    }:
        raise ModelError(
            f"config key layer_types = {layer_types!r} is not supported; expected {num_layers} "
            "entries of full_attention or sliding_attention"
        )
    sliding = layer_types.count("sliding_attention")
    if sliding == 0:
        return None
    if sliding < num_layers:
        raise ModelError(
            f"sliding attention in {sliding} of {num_layers} layers is not supported; only in all "
            "of them or in none"
        )
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"config key sliding_window must be a positive integer, got {window!r}")
    return window
