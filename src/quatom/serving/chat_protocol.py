"""Requests that carry a conversation, and those of the tokenizer's routes."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from quatom.engine.sampling import MAX_LOGPROBS, SamplingParams
from quatom.serving.closed_model import ApiModel, ClosedModel, Listed, NeutralChatFields
from quatom.serving.protocol import GenerationRequest, TokenId
from quatom.serving.tool_protocol import ToolOptions

MAX_MESSAGES = 4096


class OpenModel(ApiModel):
    """Fields that are not named here are kept: the chat template may know them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ContentPart(ApiModel):
    """A piece of a message."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(OpenModel):
    """What was called."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MadeCall(OpenModel):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(OpenModel):
    """One message of a conversation."""

    role: str
    content: str | Listed[ContentPart] | None = None
    name: str | None = None
    tool_calls: Listed[MadeCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text or part.refusal or "" for part in content)
        given = self.model_dump(exclude_none=True, exclude={"content"})
        return {**given, "content": content or ""}


Messages = Annotated[Listed[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatTemplateOptions(ToolOptions):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message excludes add_generation_prompt")
        return self


class ChatCompletionRequest(GenerationRequest, ChatTemplateOptions, NeutralChatFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def params(self) -> SamplingParams:
        """Sampling; without a limit, until the model's length."""
        return self.sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TokenizeRequest(ChatTemplateOptions):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(ClosedModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: Listed[TokenId]
