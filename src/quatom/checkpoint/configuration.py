"""What config.json and generation_config.json of a folder say, or a GGUF file in their place."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quatom.checkpoint.contents import is_present
from quatom.checkpoint.fp8 import is_fp8
from quatom.checkpoint.mxfp4 import is_mxfp4
from quatom.checkpoint.validation import instead_of, read_json
from quatom.errors import CheckpointError, ModelError
from quatom.families.keys import eos_tokens
from quatom.families.registry import read_config
from quatom.families.spec import ModelConfig
from quatom.recipe import Recipe

_MAX_BLOCKS = 1000


def with_ends(config: ModelConfig, generation: Path | None) -> tuple[ModelConfig, list[str]]:
    """The configuration with every token that ends a text, and a note of those that cannot.

    Args:
        config: of the model.
        generation: its generation_config.json, which may be missing; None: there is none.

    Raises:
        CheckpointError: the file is damaged.
        ModelError: its eos_token_id is neither a token nor a list of tokens.
    """
    extra: tuple[int, ...] = ()
    if generation is not None and is_present(generation):
        try:  # chat models list the end of a turn there only
            extra = eos_tokens(read_json(generation).get("eos_token_id"))
        except ModelError as error:
            raise ModelError(f"{generation}: {error}") from error
    tokens = dict.fromkeys(config.eos_token_ids + extra)
    known = tuple(token for token in tokens if 0 <= token < config.vocab_size)
    never = ", ".join(str(token) for token in tokens if token not in known)
    note = f"eos_token_id {never} passed over: the model has {config.vocab_size} tokens"
    return replace(config, eos_token_ids=known), [note] if never else []


def as_model_config(file: Path, config: Mapping[str, Any]) -> ModelConfig:
    """What a model computes; `file` is named in errors.

    Raises:
        ModelError: the model is not supported.
    """
    blocks = config.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > _MAX_BLOCKS:  # all would be listed before any check
        raise ModelError(
            f"{file}: num_hidden_layers {blocks} is above {_MAX_BLOCKS}, more than any model has"
        )
    try:
        return read_config(config)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def read_recipe(folder: Path, config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a Quatom checkpoint; None: a floating-point model.

    Raises:
        CheckpointError: the recipe is missing.
        ModelError: the model is quantized in another way.
        RecipeError: the recipe is unknown.
    """
    quantization = config.get("quantization_config")
    if quantization in (None, {}):
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if isinstance(quantization, Mapping) and (is_fp8(quantization) or is_mxfp4(quantization)):
        return None
    if method != "quatom":
        raise ModelError(
            f"{folder / 'config.json'}: quantization_config.quant_method {method!r} is not "
            f"supported; {instead_of(method)}"
        )
    if "recipe" not in quantization:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config has no recipe; quantize the model again"
        )
    return Recipe.from_dict(quantization["recipe"])
