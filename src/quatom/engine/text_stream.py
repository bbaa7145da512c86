"""Tokens in, text out: all at once (`text_of`), or as soon as it is certain (`TextStream`).

The pieces of a stream join to the whole text, which is what the tokenizer's decoder makes of the
prompt and all tokens, without the prompt's own text. Two things need care:

- A character may be spelled by several tokens. Its bytes wait until it is complete, or until a
  token shows that it never will be; the decoder sees whole characters alone. So a run of byte
  tokens keeps its whole characters, whatever bytes follow them.
- A token's text depends on its neighbours: a decoder drops the first space of a text, puts spaces
  between words, or drops repeated tokens. So new tokens are decoded together with those before
  them, and what they add is new text.
"""

from collections.abc import Collection, Sequence
from itertools import chain

from quatom.engine.vocabulary import Token, Vocabulary

MAX_PARTS = 16
"""Tokens with parts of characters that are read back at the end of a prompt, at most. They hold
whole characters in any case, and these are context enough."""
MAX_SILENT = 8
"""Equal tokens without text that are kept as context, at most: more than any decoder drops."""


class _Characters:
    """Tokens in, token strings out that hold whole characters."""

    def __init__(self, vocabulary: Vocabulary, hidden: Collection[int]) -> None:
        self.vocabulary = vocabulary
        self._hidden = hidden
        self.open = b""  # of a character that may go on

    def visible(self, token_id: int) -> Token | None:
        return None if token_id in self._hidden else self.vocabulary.token(token_id)

    def take(self, token: Token) -> list[str]:
        if token.part is None:
            return [*self.flush(), token.string] if self.open else [token.string]
        self.open += token.part
        return self._spell(final=False)

    def flush(self) -> list[str]:
        return self._spell(final=True) if self.open else []

    def _spell(self, *, final: bool) -> list[str]:
        spelling = self.vocabulary.spelling
        assert spelling is not None
        text, used = spelling.decode(self.open, final=final)
        self.open = self.open[used:]
        return spelling.spell(text)


def text_of(
    vocabulary: Vocabulary,
    token_ids: Sequence[int],
    *,
    hidden: Collection[int] = (),
    final: bool = True,
) -> str:
    """Text of tokens.

    Args:
        vocabulary: of their tokenizer.
        token_ids: of any length.
        hidden: tokens to leave out.
        final: False: without a last character that may go on.
    """
    characters = _Characters(vocabulary, hidden)
    tokens = (token for i in token_ids if (token := characters.visible(i)) is not None)
    strings = [string for token in tokens for string in characters.take(token)]
    return vocabulary.join(strings + characters.flush() if final else strings)


class TextStream:
    """Text of one sequence."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int] = (),
        *,
        hidden: Collection[int] = (),
    ) -> None:
        """Begin after a prompt. If it ends inside a character, that one is part of this text."""
        self._join = vocabulary.join
        self._characters = _Characters(vocabulary, hidden)
        self._context: list[list[str]] = []  # strings of the last tokens, whole characters each
        self._context_text = ""
        for token in self._end_of(prompt_ids):
            self._decode(self._characters.take(token))

    def push(self, token_id: int) -> str:
        """Text that a token makes certain; empty while its last character is incomplete."""
        token = self._characters.visible(token_id)
        return "" if token is None else self._decode(self._characters.take(token))

    def flush(self) -> str:
        """Text of an incomplete character, once no more tokens come."""
        return self._decode(self._characters.flush())

    def drop(self) -> None:
        """Forget an incomplete character."""
        self._characters.open = b""

    def _end_of(self, prompt_ids: Sequence[int]) -> list[Token]:
        """The last visible tokens of a prompt, from one on that has text of its own."""
        tokens: list[Token] = []
        for token_id in reversed(prompt_ids):
            token = self._characters.visible(token_id)
            if token is None:
                continue
            tokens.append(token)
            if self._join([token.string]) if token.part is None else len(tokens) >= MAX_PARTS:
                break
        return tokens[::-1]

    def _decode(self, strings: list[str]) -> str:
        """What token strings add to the text before them.

        The shortest end of the context that has text of its own is context enough for what follows.
        """
        if not strings:
            return ""
        join, context = self._join, self._context
        new = join([*chain.from_iterable(context), *strings])[len(self._context_text) :]
        if not new and context[-MAX_SILENT:] == [strings] * MAX_SILENT:
            return ""
        context.append(strings)
        for count in range(1, len(context) + 1):
            tail = join([*chain.from_iterable(context[-count:])])
            if tail:
                break
        self._context, self._context_text = context[-count:], tail
        return new
