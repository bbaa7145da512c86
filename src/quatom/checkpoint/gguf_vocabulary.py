"""The vocabulary in the metadata of a GGUF file, checked before anything is built of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatom.checkpoint.gguf_file import read_gguf
from quatom.errors import CheckpointError

# tokenizer.ggml.token_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""
BESIDE = "put the model's tokenizer.json and tokenizer_config.json beside the file"
"""What helps where the metadata do not."""

_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a GGUF file, checked."""

    path: Path
    entries: dict[str, Any]
    """Metadata without the prefix `tokenizer.`."""
    tokens: list[str]
    types: list[int]

    def of_type(self, *wanted: int) -> Iterator[tuple[int, str]]:
        """Ids and texts of the tokens of some types."""
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in wanted:
                yield index, token

    def flag(self, key: str, default: bool) -> bool:
        """An entry that is true or false.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.entries.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: tokenizer.{key} must be true or false, got {value!r}; correct it "
                "with gguf-new-metadata"
            )
        return value

    def array(
        self, key: str, kind: type | tuple[type, ...], length: int | None = None
    ) -> list[Any]:
        """A list of metadata.

        Raises:
            CheckpointError: it is missing, too short, or of other values.
        """
        values = self.entries.get(key)
        if not isinstance(values, list):
            raise CheckpointError(
                f"{self.path} lacks tokenizer.{key}; convert the model to GGUF again, or {BESIDE}"
            )
        if length is not None and len(values) < length:
            raise CheckpointError(
                f"{self.path}: tokenizer.{key} has {len(values)} entries for {length} tokens; "
                "convert the model to GGUF again"
            )
        if not all(isinstance(value, kind) for value in values):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise CheckpointError(
                f"{self.path}: tokenizer.{key} must hold {' or '.join(k.__name__ for k in kinds)} "
                "values; convert the model to GGUF again"
            )
        return values[:length]

    def special(self, defaults: dict[str, int]) -> dict[str, str]:
        """Special tokens by role; `defaults` are the ids where no key gives one.

        Raises:
            CheckpointError: an id is not that of a token.
        """
        found = {}
        for name, key in _ROLES.items():
            index = self.entries.get(f"ggml.{key}_token_id", defaults.get(name))
            if index is None or (name in defaults and index == defaults[name] >= len(self.tokens)):
                continue
            if not isinstance(index, int) or not 0 <= index < len(self.tokens):
                raise CheckpointError(
                    f"{self.path}: tokenizer.ggml.{key}_token_id is {index}, and there are "
                    f"{len(self.tokens)} tokens; remove the "
                    f"key with gguf-new-metadata, or {BESIDE}"
                )
            found[name] = self.tokens[index]
        return found


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    entries = {
        key.removeprefix("tokenizer."): value
        for key, value in read_gguf(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    if "ggml.model" not in entries:
        raise CheckpointError(f"{path} holds no tokenizer; {BESIDE}")
    bare = Vocabulary(path, entries, [], [])
    # llama.cpp's own names of tokens that have none.
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(bare.array("ggml.tokens", str))]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens holds {twice!r} more than once; convert the model to "
            f"GGUF again, or {BESIDE}"
        )
    types = [NORMAL] * len(tokens)
    if "ggml.token_type" in entries:
        types = bare.array("ggml.token_type", int, len(tokens))
    return Vocabulary(path, entries, tokens, types)
