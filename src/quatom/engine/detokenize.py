"""Detokenizer: tokens in, text out, never half a character and never part of a stop string."""

from collections.abc import Iterable
from typing import Any, Protocol

from quatom.engine.sampling import SamplingParams
from quatom.engine.stop_strings import StopFinder
from quatom.engine.text_stream import TextStream
from quatom.engine.vocabulary import vocabulary_of


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; transformers' tokenizers have it."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id; each says whether it is `special`."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The string of one token."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of token strings."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Iterable[int]:
        """Tokens of a text."""


class Detokenizer:
    """Text of one sequence, and the search for its stop strings."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int], params: SamplingParams) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._hidden = vocabulary.special if params.skip_special_tokens else frozenset()
        self._text = TextStream(vocabulary, prompt_ids, hidden=self._hidden)
        self._stops = StopFinder(params.stop, vocabulary, hidden=self._hidden)
        self._keep_stop = params.include_stop_str_in_output

    def append(self, token_id: int, *, find_stop: bool = True) -> tuple[str, str | None]:
        """New text, and the stop string that it ran into (or None)."""
        is_hidden = token_id in self._hidden
        new = self._stops.mark(token_id) if is_hidden else self._text.push(token_id)
        text, stop = self._stops.push(new, find=find_stop)
        if stop is None:
            return text, None
        self._text.drop()
        return text + stop * self._keep_stop, stop

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return self._stops.drain() + self._text.flush()
