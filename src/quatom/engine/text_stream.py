"""TextStream: tokens in, text out as soon as it is certain.

The texts of all tokens together are what the tokenizer's decoder makes of the prompt and all tokens,
without the prompt's own text. Two things need care:

- A character may be spelled by several tokens. Its bytes wait until it is complete, or until a
  token shows that it never will be; the decoder sees whole characters alone. So a run of byte
  tokens keeps its whole characters, whatever bytes follow them.
- A token's text depends on its neighbours: a decoder drops the first space of a text, puts spaces
  between words, or drops repeated tokens. So new tokens are decoded together with those before
  them, and what they add is new text.
"""

from collections.abc import Sequence
from itertools import chain

from quatom.engine.vocabulary import Token, Vocabulary

MAX_PARTS = 16
"""Tokens with parts of characters that are read back at the end of a prompt, at most. They hold
whole characters in any case, and these are context enough."""

MAX_SILENT = 8
"""Equal tokens without text that are kept as context, at most: more than any decoder drops."""


class TextStream:
    """Text of one sequence."""

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = (), *, skip_special: bool
    ) -> None:
        """Begin after a prompt. If it ends inside a character, that one is part of this text."""
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._open = b""  # of a character that may go on
        self._context: list[list[str]] = []  # strings of the last tokens, whole characters each
        self._context_text = ""
        for token in self._end_of(prompt_ids):
            self._take(token)

    def push(self, token_id: int) -> str:
        """Text that a token makes certain; empty while its last character is incomplete."""
        token = self._visible(token_id)
        return "" if token is None else self._take(token)

    def flush(self) -> str:
        """Text of an incomplete character, once no more tokens come."""
        return self._take_bytes(final=True) if self._open else ""

    def drop(self) -> None:
        """Forget an incomplete character."""
        self._open = b""

    def _visible(self, token_id: int) -> Token | None:
        token = self._vocabulary.token(token_id)
        return None if token is None or (token.special and self._skip_special) else token

    def _end_of(self, prompt_ids: Sequence[int]) -> list[Token]:
        """The last visible tokens of a prompt, from one on that has text of its own."""
        tokens: list[Token] = []
        for token_id in reversed(prompt_ids):
            token = self._visible(token_id)
            if token is None:
                continue
            tokens.append(token)
            if token.part is None:
                if token.alone:
                    break
            elif len(tokens) >= MAX_PARTS:
                break
        return tokens[::-1]

    def _take(self, token: Token) -> str:
        if token.part is not None:
            self._open += token.part
            return self._take_bytes(final=False)
        return self.flush() + self._decode([token.string], token.alone)

    def _take_bytes(self, *, final: bool) -> str:
        spelling = self._vocabulary.spelling
        assert spelling is not None
        text, used = spelling.decode(self._open, final=final)
        self._open = self._open[used:]
        if not text:
            return ""
        strings = spelling.spell(text)
        return self._decode(strings, self._vocabulary.join(strings))

    def _decode(self, strings: list[str], alone: str) -> str:
        """What token strings add to the text before them.

        The shortest end of the context that has text of its own is context enough for what follows.
        """
        join, context = self._vocabulary.join, self._context
        text = join([*chain.from_iterable(context), *strings])
        new = text[len(self._context_text) :]
        if alone:
            self._context, self._context_text = [strings], alone
        elif new or context[-MAX_SILENT:] != [strings] * MAX_SILENT:
            context.append(strings)
            for count in range(1, len(context) + 1):
                tail = join([*chain.from_iterable(context[-count:])])
                if tail:
                    break
            self._context, self._context_text = context[-count:], tail
        return new
