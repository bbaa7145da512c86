"""The tokenizer of a model on disk, and its copy in a checkpoint.

tokenizer.json decides, as the tokenizers library reads it. Where there is none, the tokenizer is
built from what the folder or the GGUF file says, or refused.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quatom.checkpoint.contents import is_present
from quatom.checkpoint.reader import TensorSource
from quatom.checkpoint.tokenizer_core import SPECIAL_NAMES
from quatom.checkpoint.tokenizer_folder import has_files, read_folder
from quatom.checkpoint.tokenizer_gguf import build_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_FOLDERS = ("additional_chat_templates",)


def tokenizer_from_source(source: TensorSource) -> "PreTrainedTokenizerBase":
    """The tokenizer, with special tokens and chat template.

    Raises:
        CheckpointError: the folder has no tokenizer files, or they cannot be read as they are.
        ModelError: a GGUF file's tokenizer is of a kind that is not supported.
    """
    if only_in_gguf(source):
        assert source.gguf is not None
        return build_from_gguf(source.gguf)
    return read_folder(source.folder)


def find_tokenizer(source: TensorSource) -> "PreTrainedTokenizerBase | None":
    """`tokenizer_from_source`; None where the model comes without a tokenizer: token ids work."""
    if source.gguf is None and not has_files(source.folder):
        return None
    return tokenizer_from_source(source)


def write_tokenizer(source: TensorSource, target_folder: Path) -> None:
    """Copy tokenizer files, chat templates and generation settings; build them for a GGUF file."""
    if only_in_gguf(source):
        assert source.gguf is not None
        _save_built(build_from_gguf(source.gguf), target_folder)
        return
    for name in _FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target_folder / name)
    for name in _FOLDERS:
        if (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, target_folder / name, dirs_exist_ok=True)


def only_in_gguf(source: TensorSource) -> bool:
    """Whether the GGUF file's own tokenizer counts: a tokenizer.json beside it goes first."""
    return source.gguf is not None and not is_present(source.folder / "tokenizer.json")


def _save_built(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Like save_pretrained, with the same bytes and class name under every transformers version."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {name: token for name in SPECIAL_NAMES if (token := getattr(tokenizer, name))}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if tokenizer.chat_template:
        template = str(tokenizer.chat_template)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
