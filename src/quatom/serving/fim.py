"""Fill in the middle: a prompt of what comes before and after the text to be written."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quatom.errors import RequestError
from quatom.serving.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class FimTokens:
    """A family's tokens, in the order prefix, suffix, middle."""

    family: str
    before: str
    after: str
    middle: str
    ends: tuple[str, ...] = ()
    """Tokens that end the middle beside the model's own end-of-sequence tokens."""


FAMILIES = (
    FimTokens(
        "Qwen2.5-Coder",
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    ),
    FimTokens(
        "StarCoder",
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<fim_pad>", "<file_sep>"),
    ),
    FimTokens("CodeLlama", "▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
    FimTokens("DeepSeek-Coder", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
_PROBE = "\u263a"  # before a text, so that it does not get a space as the first word has


class FillInTheMiddle:
    """A tokenizer's way to be asked for a middle."""

    def __init__(self, tokenizer: Any, texts: TextEncoder) -> None:
        """Take a tokenizer, and what encodes with it."""
        self._tokenizer = tokenizer
        self._texts = texts

    @cached_property
    def _added(self) -> dict[str, int]:
        return dict(self._tokenizer.get_added_vocab())

    @cached_property
    def _tokens(self) -> FimTokens:
        for tokens in FAMILIES:
            if {tokens.before, tokens.after, tokens.middle} <= self._added.keys():
                return tokens
        known = ", ".join(f"{tokens.before} ({tokens.family})" for tokens in FAMILIES)
        raise RequestError(
            "suffix: this model's tokenizer has no tokens to fill in the middle; it was searched "
            f"for {known}"
        )

    def encode(self, before: str | list[int], after: str, *, special: bool) -> list[int]:
        """Token ids of a prompt.

        Args:
            before: the text before the middle.
            after: the text after it.
            special: begin as the tokenizer begins texts.

        Raises:
            RequestError: the tokenizer has no tokens for this.
        """
        tokens, ids = self._tokens, self._added
        begin = self._encode("", special=True) if special else []
        return [
            *begin,
            ids[tokens.before],
            *(self._encode(before) if isinstance(before, str) else before),
            ids[tokens.after],
            *self._continued(after),
            ids[tokens.middle],
        ]

    def stop_token_ids(self) -> list[int]:
        """Tokens that end the middle."""
        return [self._added[end] for end in self._tokens.ends if end in self._added]

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._texts.prompt_ids(text, special=special)

    def _continued(self, text: str) -> list[int]:
        """Tokens of a text that begins no word, under tokenizers that begin texts with a space."""
        first = self._tokenizer.convert_ids_to_tokens(self._encode("a")[0])
        if first.startswith("▁"):
            probe, both = self._encode(_PROBE), self._encode(_PROBE + text)
            if both[: len(probe)] == probe:
                return both[len(probe) :]
        return self._encode(text)
