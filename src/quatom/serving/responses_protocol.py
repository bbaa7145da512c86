"""Requests to /v1/responses. What needs stored state is refused by name."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from quatom.engine.sampling import SamplingParams
from quatom.serving.chat_protocol import MAX_MESSAGES, OpenModel
from quatom.serving.closed_model import ApiModel, ClosedModel, Listed
from quatom.serving.constraint_protocol import ResponseFormat
from quatom.serving.protocol import GenerationRequest
from quatom.serving.tool_protocol import NO_TOOLS, ToolOptions

_UNSUPPORTED = (
    "previous_response_id",
    "conversation",
    "background",
    "prompt",
    "top_logprobs",
    "max_tool_calls",
    "context_management",
)


class InputPart(ApiModel):
    """A piece of an item's content."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Content = str | Listed[InputPart]


class InputMessage(OpenModel):
    """Something that was said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class InputCall(ApiModel):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(ApiModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoning(ApiModel):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    summary: Listed[InputPart] | None = None
    content: Listed[InputPart] | None = None


def _kind(item: Any) -> str:
    """A message may leave its type out."""
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(given or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]
Items = Annotated[Listed[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(ClosedModel):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ClosedModel):
    """One function."""

    type: Literal["function"]
    name: str


class AllowedFunctions(ClosedModel):
    """Only some of the functions may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Listed[FunctionChoice] = Field(min_length=1)


class TextFormat(ClosedModel):
    """What the text must fit."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("type 'json_schema' needs a schema")
        return self

    def response_format(self) -> ResponseFormat:
        """The same as /v1/chat/completions has it."""
        wanted: dict[str, Any] = {"type": self.type}
        if self.type == "json_schema":
            wanted["json_schema"] = {"name": self.name, "schema": self.schema_}
        return ResponseFormat.model_validate(wanted)


class TextOptions(ClosedModel):
    """How text is answered."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(ClosedModel):
    """How much is reasoned."""

    effort: str | None = None
    summary: str | None = None  # reasoning is answered whole
    generate_summary: str | None = None


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses."""

    input: Annotated[Items, BeforeValidator(_as_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Listed[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Listed[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    context_management: Any = None

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(
                    f"{name} is not supported: this server keeps no state and answers with text "
                    "and function calls; send the whole conversation as input"
                )
        if self.n not in (None, 1):
            raise ValueError("n must be 1")
        if self.response_format is not None:
            raise ValueError("response_format is called text.format here")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError(NO_TOOLS)
        return self

    def tool_options(self) -> ToolOptions:
        """The tools as /v1/chat/completions has them."""
        tools: list[dict[str, Any]] = []
        for tool in self.tools or ():
            function = tool.model_dump(exclude_none=True, exclude={"type"})
            tools.append({"type": "function", "function": function})
        choice: Any = self.tool_choice
        match self.tool_choice:
            case FunctionChoice(name=name):
                choice = {"type": "function", "function": {"name": name}}
            case AllowedFunctions(mode=mode, tools=allowed):
                named = [{"type": "function", "function": {"name": t.name}} for t in allowed]
                choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        return ToolOptions.model_validate(
            {
                "tools": tools,
                "tool_choice": choice,
                "parallel_tool_calls": self.parallel_tool_calls,
            }
        )

    def params(self) -> SamplingParams:
        """Sampling; without a limit, until the model's length."""
        if self.text is not None and self.text.format is not None:
            wanted = self.text.format.response_format()
            return self.model_copy(update={"response_format": wanted}).sampling(
                max_tokens=self.max_output_tokens
            )
        return self.sampling(max_tokens=self.max_output_tokens)


class ResponseUsage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """Result of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    store: Literal[False]
    usage: ResponseUsage
