"""What the engine hands out: deltas while a request runs, and whole results for offline use."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, kw_only=True)
class Timestamps:
    """Seconds of time.monotonic(); None until it has happened."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(slots=True, kw_only=True)  # one per token: frozen would double the time to make it
class SequenceDelta:
    """What one step added to one completion."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    """New text; lags behind the tokens while a character or a possible stop string is open."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first token, if asked for: the prompt's tokens from the second on."""
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache."""
    num_cache_written: int = 0
    """On the last delta: prompt tokens that this completion added to the prefix cache."""
    num_prompt: int = 0
    """Prompt tokens in all."""
    num_generated: int = 0
    """Tokens generated so far, these included."""
    interval: float | None = None
    """Seconds since this completion's last token; None for the first."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of a completion."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, unless it was an end-of-sequence token."""
    times: Timestamps | None = None
    """The completion's clock, for latency metrics."""
    error: str | None = None
    """With finish_reason "error": what went wrong."""
    hidden: tuple[float, ...] = ()
    """With `SamplingParams.embed`: the last hidden state of the prompt's last token."""
    refused: bool = False
    """With finish_reason "error": the request is at fault, its constraint turned out too costly."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One finished completion."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    hidden: tuple[float, ...] = ()
    """With `SamplingParams.embed`: the last hidden state of the prompt's last token."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All completions of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    num_cache_write_tokens: int = 0
    """Prompt tokens that were added to it: those of whole blocks that nobody had computed."""

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens of the first completion."""
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        """Generated text of the first completion."""
        return self.outputs[0].text

    def add(self, delta: SequenceDelta) -> None:
        """Append one step's tokens and text to the completion that they belong to."""
        completion = self.outputs[delta.index]
        completion.token_ids.extend(delta.token_ids)
        completion.text += delta.text
        if completion.logprobs is not None:
            completion.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.index == 0:
            self.num_cached_tokens = delta.num_cached
            self.num_cache_write_tokens = delta.num_cache_written
        completion.hidden = delta.hidden
        completion.finish_reason = delta.finish_reason
        completion.stop_reason = delta.stop_reason
