"""The logprobs object of /v1/completions: tokens as strings, and where each begins in the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quatom.engine.outputs import TokenLogprobs
from quatom.engine.sampling import SamplingParams
from quatom.engine.text_stream import TextStream
from quatom.serving.prompt import PromptEncoder
from quatom.serving.protocol import CompletionRequest


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt as a choice's text shows it."""

    text: str = ""
    places: Sequence[int] = ()
    """Where each of its tokens begins in the text, if log-probabilities are asked for."""


def make_echo(encoder: PromptEncoder, body: CompletionRequest, prompt: str | list[int]) -> Echo:
    """What `body.echo` shows of one of its prompts."""
    scored = body.logprobs is not None
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        return Echo(prompt, encoder.places(prompt, special=special) if scored else ())
    # A character that the prompt only begins is completed by the generated text, if there is any.
    text = encoder.decode(prompt, final=body.max_tokens == 0)
    vocabulary = encoder.vocabulary
    stream = TextStream(vocabulary) if vocabulary is not None and scored else None
    return Echo(text, _places(stream, prompt)[0])


class CompletionLogprobs:
    """Logprobs of one choice, at once or as its tokens come: both are the same."""

    def __init__(
        self, encoder: PromptEncoder, prompt_ids: list[int], params: SamplingParams, echo: Echo
    ) -> None:
        """Begin after a prompt, of which the choice's text shows `echo`."""
        self._encoder = encoder
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._text = None
        if (vocabulary := encoder.vocabulary) is not None:
            hidden = vocabulary.special if params.skip_special_tokens else ()
            self._text = TextStream(vocabulary, prompt_ids, hidden=hidden)
        self._length = len(echo.text)  # characters of the text so far

    def prompt(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """OpenAI's object for the echoed prompt.

        Nothing comes before its first token. That one's log-probability is 0, as of a given token,
        since OpenAI's schema has no null here.

        Args:
            entries: of the prompt's tokens from the second on.
        """
        given = TokenLogprobs(self._prompt_ids[0], 0.0)
        return self._object([given, *entries], self._echo.places)

    def next(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """OpenAI's object for the next generated tokens."""
        places, length = _places(self._text, [entry.token_id for entry in entries])
        places = [self._length + place for place in places]
        self._length += length
        return self._object(entries, places)

    def _object(self, entries: Sequence[TokenLogprobs], places: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._string(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": list(places),
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely strings. Where tokens share one (`a` and `<0x61>`), the likeliest's."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self._string(token_id), logprob)
        if top:
            top.setdefault(self._string(entry.token_id), entry.logprob)
        return top

    def _string(self, token_id: int) -> str:
        """As OpenAI writes it: `bytes:` comes before what is not whole characters."""
        string, data = self._encoder.token_string(token_id), self._encoder.token_bytes(token_id)
        return string if data is None or data == string.encode() else f"bytes:{string}"


def joined(*objects: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """One object of several."""
    return {key: [item for part in objects for item in part[key]] for key in objects[0]}


def _places(text: TextStream | None, token_ids: list[int]) -> tuple[list[int], int]:
    """Where each token begins in the text that they make, and the length of that."""
    places, length = [], 0
    for token_id in token_ids:
        places.append(length)
        length += 0 if text is None else len(text.push(token_id))
    return places, length
