"""What is beside tokenizer.json: roles of tokens, added tokens, chat templates."""

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quatom.checkpoint.contents import check_contents, is_present
from quatom.checkpoint.tokenizer_core import SPECIAL_NAMES
from quatom.checkpoint.validation import read_json
from quatom.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "tokenizer_config.json"
READ = (*SPECIAL_NAMES, "added_tokens_decoder", "chat_template", "clean_up_tokenization_spaces")
"""Keys of tokenizer_config.json that are read always."""
READ_BY_CLASS = ("tokenizer_class", "add_bos_token", "add_eos_token")
"""Keys that are read where tokenizer.json does not say what begins and ends a text."""
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json as transformers does.

    Raises:
        CheckpointError: one of them is no JSON object.
    """
    settings = read_json(folder / CONFIG) if is_present(folder / CONFIG) else {}
    extra = folder / "special_tokens_map.json"
    if is_present(extra) and "added_tokens_decoder" not in settings:
        settings |= read_json(extra)
    return settings


def add_listed_tokens(core: "Tokenizer", folder: Path, settings: Mapping[str, Any]) -> None:
    """Add tokens that are listed beside the tokenizer only, where they get the listed ids.

    Raises:
        CheckpointError: the list is damaged, or gives a token another id.
    """
    for index, token in sorted(_listed_tokens(folder, settings).items()):
        if core.token_to_id(token.content) is None:
            core.add_tokens([token])
        found = core.token_to_id(token.content)
        if found != index:
            raise CheckpointError(
                f"{folder}: token {token.content!r} is {found} in the tokenizer and {index} in the "
                f"list of {CONFIG} or added_tokens.json; copy all tokenizer files of one model"
            )


def _listed_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, Any]:
    from tokenizers import AddedToken

    try:
        listed = settings.get("added_tokens_decoder") or {}
        older = folder / "added_tokens.json"
        if not listed and is_present(older):
            return {
                operator.index(index): AddedToken(text, normalized=False)
                for text, index in read_json(older).items()
            }
        return {
            int(index): AddedToken(
                entry["content"], **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
            )
            for index, entry in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the added tokens in {CONFIG} or added_tokens.json are damaged ({error!r}); "
            "copy the tokenizer files of the model there"
        ) from error


def flag(folder: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    """An entry that is true or false; null is false, as in transformers.

    Raises:
        CheckpointError: it is something else.
    """
    value = settings.get(name, default)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{folder / CONFIG}: {name} must be true or false, got {value!r}")
    return bool(value)


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by role.

    Raises:
        CheckpointError: one of them is no text.
    """
    found = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{folder / CONFIG}: {name} must be a text, got {value!r}")
        if value:
            found[name] = value
    return found


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name; files go before tokenizer_config.json, as in transformers.

    Raises:
        CheckpointError: a file cannot be read, or the entry is neither a text nor a list of them.
    """
    files = {f.stem: f for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if is_present(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    for file in files.values():
        if not file.is_file() or file.stat().st_size:  # an empty file is an empty template
            check_contents(file, text=True)
    try:
        value: Any = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the chat templates of {folder}: {error}") from error
    value = value or settings.get("chat_template")
    try:
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}
        texts = value if isinstance(value, dict) else {} if value is None else {"default": value}
        if not all(isinstance(part, str) for pair in texts.items() for part in pair):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: chat_template must be a text, or a list of entries with name and "
            "template"
        ) from error
    return texts["default"] if texts.keys() == {"default"} else texts or None
