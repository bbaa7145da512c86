"""Requests: OpenAI's fields, and vLLM's where OpenAI has none. Unknown fields are refused.

Types are strict (no "5" for 5), numbers finite, and JSON is parsed by pydantic itself, so that
nesting, UTF-8 and numbers are checked before anything else sees them.
"""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from quatom.engine.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from quatom.errors import RequestError
from quatom.serving.closed_model import ClosedModel, HarmlessFields, Listed, NeutralFields
from quatom.serving.constraint_protocol import ConstraintFields

TokenId = Annotated[int, Field(ge=0, lt=2**32)]  # as tokenizers count; vocabularies are smaller
TokenIds = Annotated[Listed[TokenId], Field(min_length=1)]

MAX_PROMPTS = 2048
MAX_TOKEN_DIGITS = 10


class StreamOptions(ClosedModel):
    """What a stream reports besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # random padding; there is none


class GenerationRequest(ConstraintFields, HarmlessFields, NeutralFields):
    """Fields that completions and chat share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    stop: str | Listed[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # Beyond OpenAI, as vLLM has them.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[Listed[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Listed[str] | None = None
    return_token_ids: bool | None = None

    def sampling(self, *, max_tokens: int | None, **more: Any) -> SamplingParams:
        """SamplingParams of the fields that are set; max_tokens None: to the model's length.

        Raises:
            RequestError: their values contradict each other.
        """
        same_names = (
            "n",
            "temperature",
            "top_p",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "ignore_eos",
            "stop_token_ids",
            "bad_words",
            "skip_special_tokens",
            "include_stop_str_in_output",
        )
        given = {name: getattr(self, name) for name in same_names}
        if self.stop is not None:
            given["stop"] = self.stop
        if self.logit_bias:
            given["logit_bias"] = _token_ids(self.logit_bias)
        given["structured"] = self.structured()
        given = {k: v for k, v in {**given, **more}.items() if v is not None}
        return SamplingParams(max_tokens=max_tokens, **given)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[Listed[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Listed[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        if self.suffix and self.echo:
            raise ValueError("suffix excludes echo: the prompt is not one text")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of} must equal n {self.n or 1}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 together with echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def params(self) -> SamplingParams:
        """Sampling of every prompt; echo asks for the prompt's log-probabilities too."""
        scored = self.logprobs if self.echo else None
        return self.sampling(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=scored,
        )


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_DIGITS):
            raise RequestError(f"logit_bias keys are token ids, got {key[:40]!r}")
    return {int(key): value for key, value in bias.items()}
