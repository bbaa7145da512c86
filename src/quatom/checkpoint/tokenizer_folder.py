"""Tokenizer files of a Hugging Face folder -> a tokenizer.

tokenizer.json is the tokenizer: vocabulary, merges, pattern, special tokens, what begins and ends
a text. tokenizer_config.json names the roles of tokens (which one begins a text, which one ends
it) and the chat template, and is asked for nothing that tokenizer.json says. Its tokenizer_class
in particular does not count: transformers 5 builds a tokenizer of that class from the vocabulary
alone, with the pattern of the class, which is not always that of the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quatom.checkpoint.byte_level import PATTERNS
from quatom.checkpoint.contents import check_contents, is_present
from quatom.checkpoint.tokenizer_core import add_template, wrap_core
from quatom.checkpoint.tokenizer_sentencepiece import read_model
from quatom.checkpoint.tokenizer_settings import (
    CONFIG,
    add_listed_tokens,
    chat_template,
    flag,
    read_settings,
    special_tokens,
)
from quatom.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Classes whose pattern and normalization are known where only vocab.json and merges.txt are there.
_BYTE_LEVEL_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
# In transformers 4 these classes begin every text with bos_token, unless add_bos_token is false,
# and end it with eos_token if add_eos_token is true. All other classes leave it to tokenizer.json.
_BEGINNING_CLASSES = (*_SENTENCEPIECE_CLASSES, "CohereTokenizer")
# Ids that no token has; the tokenizers library visits each when it copies a tokenizer.
_MAX_HOLES = 1 << 20
_TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def has_files(folder: Path) -> bool:
    """Whether there is any tokenizer file, readable or not."""
    return any(folder.glob("tokenizer*")) or is_present(folder / "vocab.json")


def read_folder(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder.

    Raises:
        CheckpointError: there are no tokenizer files, or they do not say how text is cut.
    """
    settings = read_settings(folder)
    if is_present(folder / "tokenizer.json"):
        core = _read_core(folder / "tokenizer.json")
    elif is_present(folder / "vocab.json") and is_present(folder / "merges.txt"):
        core = _byte_level_core(folder, settings)
    elif is_present(folder / "tokenizer.model"):
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        core = _sentencepiece_core(folder, settings)
    else:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; copy the tokenizer files of "
            "the model there"
        )
    add_listed_tokens(core, folder, settings)
    special = special_tokens(folder, settings)
    if _begins_by_class(core, settings):
        bos = special.get("bos_token") if flag(folder, settings, "add_bos_token", True) else None
        eos = special.get("eos_token") if flag(folder, settings, "add_eos_token", False) else None
        add_template(core, bos, eos)
    return wrap_core(
        core,
        special,
        chat_template(folder, settings),
        clean_up=settings.get("clean_up_tokenization_spaces") is True,
    )


def class_counts(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `tokenizer_class` is asked for what tokenizer.json does not say."""
    file = folder / "tokenizer.json"
    return not is_present(file) or _begins_by_class(_read_core(file), settings)


def _begins_by_class(core: "Tokenizer", settings: Mapping[str, Any]) -> bool:
    return _class_name(settings) in _BEGINNING_CLASSES and not _has_template(core)


def _read_core(file: Path) -> "Tokenizer":
    import tokenizers

    check_contents(file, text=True)
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(
            f"{file} cannot be read by tokenizers {tokenizers.__version__} ({_reason(error)}): it "
            "is damaged, or of a newer release (pip install -U tokenizers)"
        ) from error
    vocabulary = core.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary and vocabulary[last] - len(vocabulary) > _MAX_HOLES:
        raise CheckpointError(
            f"{file} gives {last!r} the id {vocabulary[last]} and has {len(vocabulary)} tokens: it "
            "is damaged; copy the model's own there"
        )
    for step in _post_processors(core):
        known = step.get("special_tokens", {})
        for piece in (*step.get("single", ()), *step.get("pair", ())):
            if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in known:
                raise CheckpointError(
                    f"{file}: its post-processor adds {piece['SpecialToken']['id']!r} and does not "
                    "give its id; copy the model's own there"
                )
    return core


def _byte_level_core(folder: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    name = _class_name(settings)
    if name not in _BYTE_LEVEL_CLASSES:
        raise CheckpointError(
            f"{folder} has vocab.json and merges.txt but no tokenizer.json, and {CONFIG} gives the "
            f"class {settings.get('tokenizer_class')!r}: how text is cut is known of "
            f"{' and '.join(_BYTE_LEVEL_CLASSES)} only; make tokenizer.json with transformers' "
            "save_pretrained"
        )
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    check_contents(vocab, text=True)
    check_contents(merges, text=True)
    from tokenizers import models

    try:
        ids, pairs = models.BPE.read_file(str(vocab), str(merges))
        return PATTERNS[_BYTE_LEVEL_CLASSES[name]].tokenizer(ids, pairs)
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(
            f"cannot read vocab.json and merges.txt of {folder}: {_reason(error)}"
        ) from error


def _sentencepiece_core(folder: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    file, name = folder / "tokenizer.model", _class_name(settings)
    check_contents(file, text=False)
    remedy = "put the model's tokenizer.json beside it"
    if name not in _SENTENCEPIECE_CLASSES:
        raise CheckpointError(
            f"{file}: how the class {settings['tokenizer_class']!r} reads it is not known; {remedy}"
        )
    return read_model(file)


def _class_name(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class")).removesuffix("Fast")


def _has_template(core: "Tokenizer") -> bool:
    """Whether the file's own post-processor says what begins and ends a text."""
    return any(step["type"] in _TEMPLATES for step in _post_processors(core))


def _post_processors(core: "Tokenizer") -> list[dict[str, Any]]:
    """The steps after the merges, as tokenizer.json has them."""
    if core.post_processor is None:
        return []
    state = json.loads(core.post_processor.__getstate__())
    return list(state["processors"]) if state["type"] == "Sequence" else [state]


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
