"""Models of requests: strict types, and no field that is taken and then ignored.

A field that this server does not know is refused by its name. A field of OpenAI or vLLM that it
knows and does not carry out is declared with the values that ask for nothing.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(fail_fast=True)]
"""The first wrong item ends the check of a list: otherwise millions of them cost seconds."""


class ApiModel(BaseModel):
    """Strict types, finite numbers; fields that are not named here are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class ClosedModel(ApiModel):
    """Fields that are not named here are refused."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


One = Annotated[float, Field(ge=1.0, le=1.0)]
Zero = Annotated[int, Field(ge=0, le=0)]


class HarmlessFields(ClosedModel):
    """What is accepted because no answer depends on it."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    request_id: str | None = None


class NeutralFields(ClosedModel):
    """Fields of vLLM that are not carried out: only values that ask for nothing are accepted."""

    use_beam_search: Literal[False] | None = None
    length_penalty: One | None = None
    early_stopping: Literal[False] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    priority: Zero | None = None
    allowed_token_ids: None = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    logits_processors: None = None
    kv_transfer_params: None = None
    vllm_xargs: None = None
    cache_salt: None = None


class NeutralChatFields(ClosedModel):
    """The same for a conversation, OpenAI's own fields included."""

    modalities: Listed[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: dict[str, Any] | None = None  # it only makes some servers faster
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    include_reasoning: Literal[True] | None = None
    chat_template: None = None
    documents: None = None
    mm_processor_kwargs: None = None
    media_io_kwargs: None = None
    audio: None = None
    web_search_options: None = None
    moderation: None = None
    functions: None = None
    function_call: None = None
