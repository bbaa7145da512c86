"""Detokenizer: tokens in, text out, never half a character and never part of a stop string."""

from typing import Any

from quatom.engine.sampling import SamplingParams
from quatom.engine.stop_strings import StopFinder
from quatom.engine.text_stream import TextStream
from quatom.engine.vocabulary import vocabulary_of


class Detokenizer:
    """Text of one sequence, and the search for its stop strings."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int], params: SamplingParams) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._hidden: frozenset[int] = frozenset()
        if params.skip_special_tokens:
            self._hidden = vocabulary.special.difference(params.shown_token_ids)
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
