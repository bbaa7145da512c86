"""Detokenizer: tokens in, text out, never half a character and never part of a stop string.

A token's text depends on the tokens before it, so new tokens are decoded together with the ones
emitted last, and what they add is new text. If that ends in U+FFFD, its last character may still
be incomplete: the tokens that make it, at most 3 bytes, stay open until the next one. The text of
all deltas together is then the text of all tokens.
"""

from collections.abc import Callable
from typing import Protocol

from quatom.engine.sampling import SamplingParams

MAX_OPEN = 3
"""Tokens held back for an incomplete character: one for each byte that it can have so far."""
CONTEXT = 5
"""Prompt tokens decoded along with the first output token, for its leading space."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; transformers' tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Tokens of a text."""


def fast_decode(tokenizer: Tokenizer) -> Callable[..., str]:
    """The tokenizer's decode, without transformers' layer above the Rust core where that adds none.

    That layer takes 3 of 4 microseconds a call, and there are two calls a token.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return tokenizer.decode
    decode: Callable[..., str] = core.decode
    return decode


class Detokenizer:
    """Text of one sequence, and the search for its stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams) -> None:
        self._decode_ids = fast_decode(tokenizer)
        self._skip_special = params.skip_special_tokens
        self._stop = params.stop
        self._keep_stop = params.include_stop_str_in_output
        self._ids = prompt_ids[-CONTEXT:]  # the context, then tokens whose text is still open
        self._num_context = len(self._ids)
        self._context_text = self._decode(self._ids)
        self._held = ""  # decoded, but possibly the start of a stop string

    def append(self, token_id: int, *, find_stop: bool = True) -> tuple[str, str | None]:
        """New text, and the stop string that it ran into (or None)."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_open = self._num_open(text) if text.endswith("\ufffd") else 0
        if num_open == len(self._ids) - self._num_context:
            return "", None
        new = text[len(self._context_text) : len(text) - (num_open > 0)]
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids) - num_open
        self._context_text = self._decode(self._ids[: self._num_context])
        return self._emit(new, find_stop)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        open_text = self._decode(self._ids)[len(self._context_text) :]
        held, self._held = self._held, ""
        return held + open_text

    def drop(self) -> None:
        """Forget what was held back: it belongs to a stop string."""
        self._held = ""
        self._ids = self._ids[: self._num_context]

    def _num_open(self, text: str) -> int:
        """How many of the last tokens make nothing but the last, incomplete character."""
        for count in range(1, min(MAX_OPEN, len(self._ids) - self._num_context) + 1):
            if self._decode(self._ids[:-count]) == text[:-1]:
                return count
        return 0  # a whole token that is no text: it will not become any

    def _emit(self, new: str, find_stop: bool) -> tuple[str, str | None]:
        if not self._stop:
            return new, None
        text = self._held + new
        if find_stop:
            hits = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
            if hits:
                at, stop = min(hits)
                self.drop()
                return text[: at + len(stop) * self._keep_stop], stop
        kept = self._possible_stop_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None

    def _possible_stop_length(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0

    def _decode(self, ids: list[int]) -> str:
        return self._decode_ids(ids, skip_special_tokens=self._skip_special)
