"""The tokenizer that a GGUF file describes in its metadata, built of the tokenizers library.

What metadata does not say has the value that llama.cpp gives it, by the type of the tokenizer. A
byte-level BPE does not say how text is cut before merging: `tokenizer.ggml.pre` names a pattern,
and only patterns that are known are read.

transformers' own reader takes GPT-2's pattern for names that it does not know.

Source: llama.cpp, src/llama-vocab.cpp, for the defaults.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from quatom.checkpoint.byte_level import PATTERNS, Pattern
from quatom.checkpoint.gguf_vocabulary import (
    BESIDE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from quatom.checkpoint.tokenizer_core import add_template, wrap_core
from quatom.checkpoint.tokenizer_sentencepiece import build_bpe
from quatom.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def build_from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: metadata is missing or damaged.
        ModelError: the tokenizer is of a kind that is not supported, or does not name its pattern.
    """
    from tokenizers import AddedToken

    vocabulary = read_vocabulary(path)
    entries = vocabulary.entries
    kind, pre = entries.get("ggml.model"), entries.get("ggml.pre")
    if kind == "llama":
        core, special, add_bos = _sentencepiece(vocabulary)
    elif kind == "gpt2" and isinstance(pre, str) and pre in PATTERNS:
        core, special, add_bos = _byte_level(vocabulary, PATTERNS[pre])
    else:
        named = f"pre-tokenizer {pre!r}" if pre else "no tokenizer.ggml.pre"
        with_pre = f" with {named}" if kind == "gpt2" else ""
        known = f"gpt2 with one of {len(PATTERNS)} names of tokenizer.ggml.pre"
        raise ModelError(
            f"{path}: tokenizer {kind!r}{with_pre} is not supported; llama is, and {known}"
            f" (docs/reference/model-files.md); {BESIDE}"
        )
    core.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=vocabulary.types[index] == CONTROL,
            )
            for index, token in vocabulary.of_type(CONTROL, USER_DEFINED)
            if token
        ]
    )
    add_template(
        core,
        special.get("bos_token") if vocabulary.flag("ggml.add_bos_token", add_bos) else None,
        special.get("eos_token") if vocabulary.flag("ggml.add_eos_token", False) else None,
    )
    template = entries.get("chat_template")
    if not isinstance(template, str | None):
        raise CheckpointError(
            f"{path}: tokenizer.chat_template must be a text, got {template!r:.60}; correct it "
            "with gguf-new-metadata"
        )
    return wrap_core(core, special, template)


def _byte_level(
    vocabulary: Vocabulary, pattern: Pattern
) -> tuple["Tokenizer", dict[str, str], bool]:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    # A piece may be a space as far as the file goes: the first character never separates.
    merges = []
    for line in vocabulary.array("ggml.merges", str):
        cut = line.find(" ", 1)
        left, right = (line[:cut], line[cut + 1 :]) if cut > 0 else (line, "")
        merges.append((left, right))
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{vocabulary.path}: tokenizer.ggml.merges joins {left!r} and {right!r}, which are "
                f"not all tokens; convert the model to GGUF again, or {BESIDE}"
            )
    core = pattern.tokenizer(ids, merges)
    return core, vocabulary.special({}), pattern.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple["Tokenizer", dict[str, str], bool]:
    scores = vocabulary.array("ggml.scores", (float, int), len(vocabulary.tokens))
    special = vocabulary.special({"bos_token": 1, "eos_token": 2, "unk_token": 0})
    core = build_bpe(
        vocabulary.tokens,
        {index: scores[index] for index, _ in vocabulary.of_type(NORMAL, UNUSED)},
        unknown=special.get("unk_token"),
        prefix=vocabulary.flag("ggml.add_space_prefix", True),
    )
    return core, special, True
