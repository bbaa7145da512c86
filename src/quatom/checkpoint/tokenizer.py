"""The tokenizer of a model folder, and its copy in a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quatom.checkpoint.reader import TensorSource
from quatom.errors import CheckpointError, ModelError

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

# Pre-tokenizers of byte-level BPE by the name that GGUF files give them: the pattern that cuts
# text into pieces, "digits" for single digits before GPT-2's own pattern, None for that alone.
# Source: the patterns in the models' own tokenizer.json files.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS: dict[str, str | None] = {
    "smollm": "digits",
    "qwen2": _QWEN2,
    "llama-bpe": _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "gpt-2": None,
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def tokenizer_from_source(source: TensorSource) -> "PreTrainedTokenizerBase":
    """The tokenizer, with special tokens and chat template.

    Raises:
        CheckpointError: the folder has no tokenizer files, or transformers cannot read them.
        ModelError: a GGUF file's tokenizer is of a kind that is not supported.
    """
    if source.gguf is not None and not (source.folder / "tokenizer.json").exists():
        return _from_gguf(source.gguf)
    if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{source.folder} has neither tokenizer.json nor tokenizer.model; copy the tokenizer "
            "files of the model there"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"cannot read the tokenizer of {source.folder}: {reason}") from error


def write_tokenizer(source: TensorSource, target_folder: Path) -> None:
    """Copy tokenizer files, chat templates and generation settings; build them for a GGUF file."""
    if source.gguf is not None and not (source.folder / "tokenizer.json").exists():
        _save_built(_from_gguf(source.gguf), target_folder)
        return
    for name in _FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target_folder / name)
    for name in _FOLDERS:
        if (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, target_folder / name, dirs_exist_ok=True)


def _save_built(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Like save_pretrained, with the same bytes and class name under every transformers version."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    settings |= {name: token for name in names if (token := getattr(tokenizer, name))}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if tokenizer.chat_template:
        template = str(tokenizer.chat_template)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    """Byte-level BPE built from metadata.

    transformers' own reader does not know every tokenizer.ggml.pre: SmolLM's numerals would be cut
    by GPT-2's pattern, and Qwen2's text would not be normalized, unlike in training.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    from quatom.checkpoint.gguf_file import read_gguf

    entries = {
        k.removeprefix("tokenizer."): v
        for k, v in read_gguf(path).metadata.items()
        if k.startswith("tokenizer.")
    }
    kind, pre = entries.get("ggml.model"), entries.get("ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PATTERNS:
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported (gpt2 with "
            f"{', '.join(_PATTERNS)} is); put the model's tokenizer.json and tokenizer_config.json "
            "beside the file"
        )
    tokens: list[str] = entries["ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in entries["ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(_PATTERNS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    special = _special_tokens(entries, tokens)
    if entries.get("ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        steps.append(
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokens.index(bos))],
            )
        )
    tokenizer.post_processor = processors.Sequence(steps)
    types = entries.get("ggml.token_type", [])
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == _CONTROL)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=entries.get("chat_template"),
        **special,
    )


def _pre_tokenizer(pattern: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == "digits":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _special_tokens(entries: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    ids = {name: entries.get(f"ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None}
