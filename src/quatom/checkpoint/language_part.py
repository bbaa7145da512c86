"""The config.json of the language part of a model that reads images or sound, too."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quatom.errors import ModelError
from quatom.families.refused import check_not_refused, nearest
from quatom.families.registry import FAMILIES

WRAPPERS = (
    "AudioFlamingo3ForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
"""Architectures whose language part reads text as the model of its model_type does.

Others do not: PaliGemma's sees a whole prompt at once. What the language model does to logits (a
soft-cap, a divisor) is done here; transformers' classes of these architectures leave it out.
"""
_MODEL_TYPES = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""Language parts -> the model_type that they are without images. An image's tokens have three
positions there. Those of text are equal, so that rotary embedding is the usual one."""
_CONSTANTS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "qwen3_vl_moe_text": lambda _: {"norm_topk_prob": True},
    "glm4v_text": lambda text: {
        "attention_bias": True,
        "head_dim": text["hidden_size"] // text["num_attention_heads"],
    },
}
"""Language parts -> what they compute whatever their keys say."""
_ALL_TURN = ("glm4v_text",)
"""Language parts all of whose channels turn where their files do not say how many."""
_MODEL = "ForConditionalGeneration"
_POSITIONS_OF_IMAGES = ("mrope_interleaved", "mrope_section")
# What early files say in text_config of how images become tokens.
_OF_IMAGES = ("perceiver_config", "pixel_shuffle_factor", "use_resampler")
# Keys of the larger model that hold for its language part.
_SHARED = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
)


def language_part(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the language part, and a note that the rest is left out.

    Args:
        file: of the configuration, for errors.
        config: of config.json; returned as it is where there is nothing but a language model.

    Raises:
        ModelError: the language part is of a family that is not supported, or its keys are wrong.
    """
    name = _architecture(config)
    if name not in WRAPPERS:
        return config, []
    text = _text_config(file, name, config)
    kind = str(text.get("model_type"))
    family = next((f for f in FAMILIES if f.model_type == _MODEL_TYPES.get(kind, kind)), None)
    if family is None:
        check_not_refused(text)
        raise ModelError(
            f"{file}: the language part of {name} is of model_type {kind!r}, which is not "
            f"supported; {nearest(kind, (f.model_type for f in FAMILIES))}"
        )
    text |= {key: config[key] for key in _SHARED if config.get(key) is not None}
    constants = _CONSTANTS[kind](text) if kind in _CONSTANTS else {}
    for key, value in constants.items():
        if text.get(key) not in (None, value):
            raise ModelError(f"{file}: {name} with {key} {text[key]!r} is not supported")
        text[key] = value
    text |= {"architectures": [family.architectures[0]], "model_type": family.model_type}
    if kind in _MODEL_TYPES and isinstance(rope := text.get("rope_parameters"), Mapping):
        text["rope_parameters"] = {
            k: v for k, v in rope.items() if k not in _POSITIONS_OF_IMAGES and v != "mrope"
        }
        if kind in _ALL_TURN:
            text["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return text, [f"{name}: its language part alone is read, it takes text and nothing else"]


def _architecture(config: Mapping[str, Any]) -> str | None:
    """What config.json names, or what transformers runs for its model_type where it names none."""
    if names := config.get("architectures"):
        name = names[0] if isinstance(names, list) else names
        return name if isinstance(name, str) else None
    kind = config.get("model_type")
    if kind is None or any(family.model_type == kind for family in FAMILIES):
        return None
    kinds = ((name, getattr(_config_class(name), "model_type", None)) for name in WRAPPERS)
    return next((name for name, its_kind in kinds if its_kind == kind), None)


def _config_class(architecture: str) -> Any:
    """The class of transformers, None where this release has none."""
    import transformers

    return getattr(transformers, architecture.removesuffix(_MODEL) + "Config", None)


def _text_config(file: Path, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """Every key of the language part: files leave out what is the default of transformers' class.

    Older files have no text_config, and its keys beside those of the larger model.
    """
    try:
        kind = _config_class(architecture)
        whole = kind(**(config | {"architectures": [architecture]}))
        text: dict[str, Any] = whole.get_text_config(decoder=True).to_dict()
    except Exception as error:  # whatever a configuration class raises
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: transformers does not read it: {reason:.200}") from error
    if config.get("text_config") is None:
        own = kind().to_dict()
        for key, value in config.items():
            # null: a class has switched something off, as Qwen2 its window.
            if value is not None and key not in own and text.get(key) not in (None, value):
                raise ModelError(
                    f"{file}: transformers does not read {key} of {architecture} beside "
                    "text_config; move the keys of the language part there"
                )
        # A key that no class knows is the language part's, so that it is refused where it counts.
        known = {*own, *text, "rope_scaling"}  # its entries are rope_parameters
        text |= {key: value for key, value in config.items() if key not in known}
    return {key: value for key, value in text.items() if key not in _OF_IMAGES}
