"""Vocabulary: what single tokens are, under any decoder of the tokenizers library.

A decoder makes text of a list of token strings. Two kinds of them spell characters in bytes:
ByteLevel, where every character of a token string stands for one byte, and ByteFallback, where
`<0xE4>` is a token. Their tokens may hold parts of characters; all others hold whole ones.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("quatom.each_byte", _replace_each_byte)


@dataclass(frozen=True, slots=True)
class ByteSpelling:
    """How a decoder's tokens spell bytes."""

    tokens: tuple[str, ...]
    """The token string of each byte."""
    errors: str
    """The codecs error handler that shows bytes that are no text as the decoder does."""

    def decode(self, data: bytes, *, final: bool) -> tuple[str, int]:
        """Text of bytes, and how many of them it took: all but a character that may go on."""
        return codecs.utf_8_decode(data, self.errors, final)

    def spell(self, text: str) -> list[str]:
        """Token strings of a text, one for each byte."""
        return [self.tokens[byte] for byte in text.encode()]


def _byte_level_alphabet() -> tuple[str, ...]:
    """GPT-2's character of each byte: itself where that is visible, else the next one from 256."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return tuple(chr(b if b in visible else 256 + hidden.index(b)) for b in range(256))


BYTE_LEVEL = ByteSpelling(_byte_level_alphabet(), "replace")
BYTE_FALLBACK = ByteSpelling(tuple(f"<0x{b:02X}>" for b in range(256)), "quatom.each_byte")
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_LEVEL.tokens)}


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of a vocabulary."""

    string: str
    """As the decoder takes it."""
    special: bool
    """Whether `skip_special_tokens` leaves it out of the text."""
    part: bytes | None
    """Its bytes, if they are not whole characters."""


class Vocabulary:
    """The tokens of one tokenizer, each looked up once. Any thread may use it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        # Transformers' layer above the Rust core takes 2 of 3 microseconds per call, and there are
        # two calls for each generated token.
        core = tokenizer.backend_tokenizer
        join = " ".join if core.decoder is None else core.decoder.decode
        self._join: Callable[[list[str]], str] = join
        self._string_of: Callable[[int], str | None] = core.id_to_token
        added = core.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._tokens: dict[int, Token | None] = {}
        self._bytes: dict[int, bytes | None] = {}
        found = (s for s in (BYTE_LEVEL, BYTE_FALLBACK) if self.join(s.spell("你")) == "你")
        self.spelling = next(found, None)

    def join(self, strings: list[str]) -> str:
        """Text of token strings, by the tokenizer's decoder."""
        return self._join(strings) if strings else ""  # some decoders fail without any

    def token(self, token_id: int) -> Token | None:
        """A token; None where the model has an id that the tokenizer has not."""
        try:
            return self._tokens[token_id]
        except KeyError:
            return self._tokens.setdefault(token_id, self._look_up(token_id))

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to a text, its leading space included; None where it is no token."""
        try:
            return self._bytes[token_id]
        except KeyError:
            return self._bytes.setdefault(token_id, self._find_bytes(token_id))

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Strings of special tokens, and their ids."""
        tokens = {token_id: self.token(token_id) for token_id in self.special}
        return {token.string: i for i, token in tokens.items() if token is not None}

    def _look_up(self, token_id: int) -> Token | None:
        string = self._string_of(token_id)
        if string is None:
            return None
        return Token(string, token_id in self.special, self._part(string))

    def _part(self, string: str) -> bytes | None:
        if self.spelling is BYTE_FALLBACK and (match := _FALLBACK_TOKEN.fullmatch(string)):
            data = bytes([int(match[1], 16)])
        elif self.spelling is BYTE_LEVEL and all(char in _BYTE_OF for char in string):
            data = bytes(_BYTE_OF[char] for char in string)
        else:
            return None
        try:
            data.decode()
        except UnicodeDecodeError:
            return data
        return None

    def _find_bytes(self, token_id: int) -> bytes | None:
        token = self.token(token_id)
        if token is None:
            return None
        if token.special:
            return token.string.encode()
        if token.part is not None:
            return token.part
        # Decoders treat the first and the last token, and equal neighbours, in ways of their own.
        left, right = ("a", "b") if token.string not in ("a", "b") else ("c", "d")
        before = len(self.join([left]))
        after = len(self.join([left, right])) - before
        text = self.join([left, token.string, right])
        return text[before : len(text) - after].encode()


_known: "WeakKeyDictionary[Any, Vocabulary]" = WeakKeyDictionary()


def vocabulary_of(tokenizer: "PreTrainedTokenizerFast") -> Vocabulary:
    """The vocabulary of a tokenizer, made once for each."""
    try:
        return _known[tokenizer]
    except KeyError:
        return _known.setdefault(tokenizer, Vocabulary(tokenizer))
