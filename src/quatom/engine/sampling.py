"""SamplingParams: how the tokens of one request are chosen. `sampler` carries it out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from quatom.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives returned for one position; OpenAI's own limit for chat."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
"""Most tokens that one request may bias: OpenAI's own limit."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 200
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A constraint on the generated text, enforced token by token."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice", "structural_tag"]
    """json_object: any JSON object; regex: the whole text matches; choice: one of some texts;
    grammar: Lark or GBNF; structural_tag: free text with enforced pieces."""
    value: str = ""
    """The regular expression or the grammar; a schema, a list of choices or a structural tag as
    JSON; unused for json_object."""


def _check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}")
    inside = low < value if open_low else low <= value
    if not (math.isfinite(value) and inside and value <= high):
        left = "(" if open_low else "["
        raise RequestError(f"{name} must be in {left}{low:g}, {high:g}], got {value!r}")


def _check_count(name: str, value: object, low: int, high: int = _INT64_MAX) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        small = value < low and high == _INT64_MAX
        limit = f"at least {low}" if small else f"from {low} to {high}"
        raise RequestError(f"{name} must be {limit}, got {value}")


def _check_bad_words(words: Sequence[str]) -> None:
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(f"at most {MAX_BAD_WORDS} bad_words, got {len(words)}")
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_CHARS:
            raise RequestError(
                f"bad_words must be strings of 1 to {MAX_BAD_WORD_CHARS} characters, got "
                f"{str(word)[:40]!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Defaults are those of vLLM: temperature 1, at most 16 tokens.
    """

    n: int = 1
    """Completions of one prompt; they share the prompt's KV blocks."""
    max_tokens: int | None = 16
    """Largest number of generated tokens. None: up to the model's length. 0: none, the prompt is
    only scored (prompt_logprobs)."""
    min_tokens: int = 0
    """Least number of generated tokens: before it is reached, no end-of-sequence or stop token is
    chosen, and no stop string ends the text."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy (the largest logit, the lowest id on a tie)."""
    top_p: float = 1.0
    """Choose among the most likely tokens whose probabilities together reach this sum. Tokens of
    equal probability are kept together. 0: the most likely token; 1: all tokens."""
    top_k: int = 0
    """Choose among the k most likely tokens. Tokens of equal probability are kept together.
    0 or -1: all tokens."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this fraction of the largest one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of token ids before anything else; at most MAX_LOGIT_BIAS tokens."""
    bad_words: Sequence[str] = ()
    """Words whose tokens, with or without a space before them, are not generated one after the
    other. The same text made of other tokens is not excluded."""
    seed: int | None = None
    """The same seed gives the same random draws, whatever else is running. The logits may still
    differ in their last bits from batch to batch. None: another seed each time."""
    stop: Sequence[str] = ()
    """Generation ends when one of these appears in the text; it is not part of the text. Special
    tokens in it are found even if skip_special_tokens hides them. At most MAX_STOP_STRINGS of
    MAX_STOP_CHARS characters each."""
    stop_token_ids: Sequence[int] = ()
    """Generation ends with one of these tokens, at most MAX_STOP_TOKEN_IDS."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Continue after the model's end-of-sequence tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_token_ids: Sequence[int] = ()
    """Special tokens that stay in the text although skip_special_tokens is set."""
    detokenize: bool = True
    """Make text of the tokens; False leaves it empty and forbids stop strings."""
    logprobs: int | None = None
    """Return the log-probability of each generated token, and of this many of the most likely
    tokens. They are the model's own, before penalties and temperature. None: do not return them."""
    prompt_logprobs: int | None = None
    """As logprobs, for the tokens of the prompt after the first one. Cached prefixes are then not
    reused."""
    embed: bool = False
    """Return the last hidden state of the prompt's last token. Needs max_tokens 0."""
    structured: StructuredOutput | None = None
    """A constraint on the text: a JSON schema, a regular expression, a grammar, choices or tags."""

    def __post_init__(self) -> None:
        _check_count("n", self.n, 1, 128)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens, 0)
        _check_count("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}"
            )
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_count("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_count("seed", self.seed, -_INT64_MAX - 1, _INT64_MAX)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _check_count(name, value, 0, MAX_LOGPROBS)
        self._normalize()
        if self.embed and (self.max_tokens != 0 or self.n != 1):
            raise RequestError(
                f"embed needs max_tokens 0 and n 1, got {self.max_tokens} and {self.n}"
            )
        if self.structured is not None and self.min_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} and structured output contradict each other: the "
                "grammar alone says when the text may end"
            )
        if self.structured is not None and self.bad_words:
            raise RequestError(
                "bad_words and structured output together may leave no token: give only one"
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True: they are found in the text")

    def _normalize(self) -> None:
        """Store immutable copies, so that a caller's list cannot change a running request."""
        for name in ("stop", "stop_token_ids"):
            if not isinstance(value := getattr(self, name), str | Sequence):
                raise RequestError(f"{name} must be a list, got {value!r:.60}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings, got {len(stop)}")
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must be non-empty strings, got {list(stop)!r:.200}")
        if (longest := max(map(len, stop), default=0)) > MAX_STOP_CHARS:
            raise RequestError(
                f"a stop string has {longest} characters; at most {MAX_STOP_CHARS} are accepted"
            )
        bad_words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words)
        _check_bad_words(bad_words)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            _check_count("stop_token_ids", token_id, 0)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are "
                "accepted"
            )
        for token_id, bias in self.logit_bias.items():
            _check_count("logit_bias token id", token_id, 0)
            _check_number("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "bad_words", bad_words)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "shown_token_ids", tuple(self.shown_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without chance."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the next token can be sampled only after the host has read the last one."""
        return self.has_penalties or self.structured is not None or bool(self.bad_words)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            RequestError: an id in logit_bias or stop_token_ids is not below vocab_size.
        """
        fields: dict[str, Any] = {
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in fields.items():
            if ids and max(ids) >= vocab_size:
                raise RequestError(
                    f"{name} holds token id {max(ids)}; the model has {vocab_size} tokens, "
                    f"0 to {vocab_size - 1}"
                )
