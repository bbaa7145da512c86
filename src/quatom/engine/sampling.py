"""SamplingParams: how the tokens of one request are chosen. `sampler` carries it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from quatom.arguments import Range, Size, check_fields
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

_AtLeast0 = Annotated[int, Range(0)]
_Share = Annotated[float, Range(0, 1)]
_Penalty = Annotated[float, Range(-2, 2)]
_Logprobs = Annotated[int, Range(0, MAX_LOGPROBS)]
_Stop = Annotated[str, Size(1, MAX_STOP_CHARS)]
_BadWord = Annotated[str, Size(1, MAX_BAD_WORD_CHARS)]
_Bias = Annotated[float, Range(-100, 100)]
_Biases = Annotated[Mapping[_AtLeast0, _Bias], Size(0, MAX_LOGIT_BIAS)]


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A constraint on the generated text, enforced token by token."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice", "structural_tag"]
    """json_object: any JSON object; regex: the whole text matches; choice: one of some texts;
    grammar: Lark or GBNF; structural_tag: free text with enforced pieces."""
    value: Annotated[str, Size(0)] = ""
    """The regular expression or the grammar; a schema, a list of choices or a structural tag as
    JSON; unused for json_object."""

    def __post_init__(self) -> None:
        check_fields(self, RequestError, "structured")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Defaults are those of vLLM: temperature 1, at most 16 tokens.
    """

    n: Annotated[int, Range(1, 128)] = 1
    """Completions of one prompt; they share the prompt's KV blocks."""
    max_tokens: _AtLeast0 | None = 16
    """Largest number of generated tokens. None: up to the model's length. 0: none, the prompt is
    only scored (prompt_logprobs)."""
    min_tokens: _AtLeast0 = 0
    """Least number of generated tokens: before it is reached, no end-of-sequence or stop token is
    chosen, and no stop string ends the text."""
    temperature: Annotated[float, Range(0, 100)] = 1.0
    """Divides the logits; 0 is greedy (the largest logit, the lowest id on a tie)."""
    top_p: _Share = 1.0
    """Choose among the most likely tokens whose probabilities together reach this sum. Tokens of
    equal probability are kept together. 0: the most likely token; 1: all tokens."""
    top_k: Annotated[int, Range(-1)] = 0
    """Choose among the k most likely tokens. Tokens of equal probability are kept together.
    0 or -1: all tokens."""
    min_p: _Share = 0.0
    """Drop tokens whose probability is below this fraction of the largest one."""
    repetition_penalty: Annotated[float, Range(0, 100, open_low=True)] = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    presence_penalty: _Penalty = 0.0
    """Subtracted once from the logit of every token in the output."""
    frequency_penalty: _Penalty = 0.0
    """Subtracted from a token's logit for each time it is in the output."""
    logit_bias: _Biases = field(default_factory=dict)
    """Added to the logits of token ids before anything else; at most MAX_LOGIT_BIAS tokens."""
    bad_words: _BadWord | Annotated[Sequence[_BadWord], Size(0, MAX_BAD_WORDS)] = ()
    """Words whose tokens, with or without a space before them, are not generated one after the
    other. The same text made of other tokens is not excluded."""
    seed: int | None = None
    """The same seed gives the same random draws, whatever else is running. The logits may still
    differ in their last bits from batch to batch. None: another seed each time."""
    stop: _Stop | Annotated[Sequence[_Stop], Size(0, MAX_STOP_STRINGS)] = ()
    """Generation ends when one of these appears in the text; it is not part of the text. Special
    tokens in it are found even if skip_special_tokens hides them. At most MAX_STOP_STRINGS of
    MAX_STOP_CHARS characters each."""
    stop_token_ids: Annotated[Sequence[_AtLeast0], Size(0, MAX_STOP_TOKEN_IDS)] = ()
    """Generation ends with one of these tokens, at most MAX_STOP_TOKEN_IDS."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Continue after the model's end-of-sequence tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_token_ids: Sequence[_AtLeast0] = ()
    """Special tokens that stay in the text although skip_special_tokens is set."""
    detokenize: bool = True
    """Make text of the tokens; False leaves it empty and forbids stop strings."""
    logprobs: _Logprobs | None = None
    """Return the log-probability of each generated token, and of this many of the most likely
    tokens. They are the model's own, before penalties and temperature. None: do not return them."""
    prompt_logprobs: _Logprobs | None = None
    """As logprobs, for the tokens of the prompt after the first one. Cached prefixes are then not
    reused."""
    embed: bool = False
    """Return the last hidden state of the prompt's last token. Needs max_tokens 0."""
    structured: StructuredOutput | None = None
    """A constraint on the text: a JSON schema, a regular expression, a grammar, choices or tags."""

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        for name in ("stop", "bad_words"):
            if isinstance(one := getattr(self, name), str):
                object.__setattr__(self, name, (one,))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}"
            )
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
            RequestError: an id in logit_bias, stop_token_ids or shown_token_ids is not below
                vocab_size.
        """
        for name in ("logit_bias", "stop_token_ids", "shown_token_ids"):
            ids: Any = getattr(self, name)
            if ids and max(ids) >= vocab_size:
                raise RequestError(
                    f"{name} holds token id {max(ids)}; the model has {vocab_size} tokens, "
                    f"0 to {vocab_size - 1}"
                )
