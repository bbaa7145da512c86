"""The config.json of the language part of a model that reads images, too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quatom.errors import ModelError
from quatom.families.registry import FAMILIES

WRAPPERS = (
    "Gemma3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)
"""Architectures whose language part reads text as the model of its model_type does.

Others do not: PaliGemma's sees a whole prompt at once, Qwen2-VL's has positions of its own. What
the language model does to logits (a soft-cap, a divisor) is done here; transformers' classes of
these architectures leave it out.
"""
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
    part = config.get("text_config")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in WRAPPERS or not isinstance(part, Mapping):
        return config, []
    family = next((f for f in FAMILIES if f.model_type == part.get("model_type")), None)
    if family is None:
        raise ModelError(
            f"{file}: the language part of {name} is of model_type {part.get('model_type')!r}, "
            f"which is not supported; supported: {', '.join(f.model_type for f in FAMILIES)}"
        )
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    text = _with_defaults(file, dict(part)) | shared
    text["architectures"] = [family.architectures[0]]
    return text, [f"{name}: its language part alone is read, images are not"]


def _with_defaults(file: Path, part: dict[str, Any]) -> dict[str, Any]:
    """Every key: such files leave out what is the default of transformers' class."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.for_model(**part)
    except Exception as error:  # whatever a configuration class raises
        raise ModelError(f"{file}: text_config is not valid: {error}") from error
    described: dict[str, Any] = text.to_dict()
    return described
