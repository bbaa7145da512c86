"""TextEncoder: text -> token ids, and no more of it than a model can read."""

from typing import TYPE_CHECKING

from quatom.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

FIRST_CHARS_PER_TOKEN = 4
"""Of a long text, so many characters for each token of the limit are tried first."""
MARGIN = 1024
"""By how many tokens a part must exceed the limit. A cut changes the tokens beside it alone."""


class TextEncoder:
    """A tokenizer's Rust core. Any thread may use it, several at once.

    Transformers' layer above it sets truncation and padding at each call, and the core refuses to
    be set while it works. So both are switched off here, once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_tokens: int | None = None) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: with a core of the tokenizers library.
            max_tokens: length that no prompt may have; None: prompts may have any.
        """
        self._core = tokenizer.backend_tokenizer
        self._core.no_truncation()
        self._core.no_padding()
        self._max_tokens = max_tokens

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Token ids.

        Args:
            text: of any length.
            special: with the special tokens that the tokenizer adds.
        """
        # Of the core's methods those for batches let other threads run meanwhile.
        made: Encoding = self._core.encode_batch_fast([text], add_special_tokens=special)[0]
        return made.ids

    def prompt_ids(self, text: str, *, special: bool) -> list[int]:
        """The same. The work for a text that is far too long follows from the limit, not from it.

        Raises:
            RequestError: the text has more tokens than the limit.
        """
        if self._max_tokens is None:
            return self.ids(text, special=special)
        size = FIRST_CHARS_PER_TOKEN * self._max_tokens
        while size < len(text):
            count = len(self.ids(text[:size], special=special))
            if count > self._max_tokens + MARGIN:
                raise RequestError(
                    f"the prompt has {len(text)} characters, and the first {size} alone have "
                    f"{count} tokens; this model's limit is {self._max_tokens}, prompt and output "
                    "together: shorten the prompt"
                )
            size *= 2
        return self.ids(text, special=special)

    def encoding(self, text: str, *, special: bool) -> "Encoding":
        """Tokens with their places in the text."""
        return self._core.encode_batch([text], add_special_tokens=special)[0]
