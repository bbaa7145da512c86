"""What a request says about single tokens, prepared once for all its completions and steps."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from quatom.errors import RequestError

CONTEXTS = ("", " ", "\n")
"""A word is tokenized after each of these: at the start of a text, of a word and of a line."""


@dataclass(frozen=True, slots=True)
class TokenBias:
    """What is added to the logits of some tokens, N of them."""

    token_ids: np.ndarray  # (N,) int64
    values: np.ndarray  # (N,) float32

    @classmethod
    def of(cls, logit_bias: Mapping[int, float]) -> Self | None:
        """None: nothing is added."""
        if not logit_bias:
            return None
        return cls(
            np.fromiter(logit_bias.keys(), dtype=np.int64),
            np.fromiter(logit_bias.values(), dtype=np.float32),
        )


def gather_bias(biases: Sequence[TokenBias | None]) -> tuple[np.ndarray, np.ndarray] | None:
    """(2, n) int64 rows and token ids, and (n,) float32 values of all rows; None: there are none.

    Args:
        biases: one for each row.
    """
    given = [(row, bias) for row, bias in enumerate(biases) if bias is not None]
    if not given:
        return None
    rows = np.repeat([row for row, _ in given], [len(bias.values) for _, bias in given])
    where = np.stack([rows, np.concatenate([bias.token_ids for _, bias in given])])
    return where, np.concatenate([bias.values for _, bias in given])


class BadWords:
    """Sequences of tokens that must not be generated."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        """`sequences` are not empty."""
        self._last: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for *first, last in sequences:
            self._last[tuple(first)].add(last)
        self._lengths = sorted({len(first) for first in self._last})

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: Any) -> Self | None:
        """The tokens of some words with and without a space before them; None: there are none.

        Raises:
            RequestError: there is no tokenizer, or a word has no tokens.
        """
        if not words:
            return None
        if tokenizer is None:
            raise RequestError("bad_words need a tokenizer, and this model has none")
        return cls(ids for word in words for ids in _token_sequences(word, tokenizer))

    def banned(self, token_ids: Sequence[int], num_prompt: int) -> set[int]:
        """Tokens that would complete a sequence of generated tokens, those after the prompt."""
        found: set[int] = set()
        for length in self._lengths:
            start = len(token_ids) - length
            if start >= num_prompt:
                found |= self._last.get(tuple(token_ids[start:]), set())
        return found


def _token_sequences(word: str, tokenizer: Any) -> set[tuple[int, ...]]:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    found = set()
    for context in CONTEXTS:
        before, ids = encode(context), encode(context + word)
        found.add(ids[len(before) :] if ids[: len(before)] == before else ids)
    found.discard(())
    if not found:
        raise RequestError(f"bad_words holds {word!r}, which has no tokens")
    return found
