"""The tools of a request, and what may be called, as /v1/chat/completions has them."""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from quatom.errors import RequestError
from quatom.serving.closed_model import ApiModel, ClosedModel, Listed
from quatom.serving.tools.function import Function, by_name, make_function

NO_TOOLS = "tool_choice needs tools to choose from"


class FunctionDefinition(ApiModel):
    """A function; fields that are not named here go to the chat template."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ClosedModel):
    """Something that may be called."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The tool as templates expect it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        function.setdefault("description", "")
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


class FunctionName(ClosedModel):
    """A function by name."""

    name: str


class NamedTool(ClosedModel):
    """One function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(ClosedModel):
    """Some of the functions."""

    mode: Literal["auto", "required"]
    tools: Listed[NamedTool] = Field(min_length=1)


class AllowedToolChoice(ClosedModel):
    """Only some of the functions may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ToolOptions(ClosedModel):
    """What a request offers to be called."""

    tools: Listed[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_are_offered(self) -> Self:
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError(NO_TOOLS)
        return self

    @property
    def tools_are_shown(self) -> bool:
        """Whether the model is told of the tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        if not self.tools_are_shown:
            return None
        return [tool.for_template() for tool in self.tools or ()]

    def callable_functions(self) -> dict[str, Function]:
        """The functions that may be called.

        Raises:
            RequestError: a tool is not valid, or one is chosen that is not offered.
        """
        made = [
            make_function(t.function.name, t.function.parameters, t.function.strict)
            for t in self.tools or ()
        ]
        functions = by_name(made)
        if self.tool_choice == "none":
            return {}
        match self.tool_choice:
            case NamedTool(function=function):
                return chosen(functions, [function.name])
            case AllowedToolChoice(allowed_tools=allowed):
                return chosen(functions, [tool.function.name for tool in allowed.tools])
        return functions

    @property
    def call_required(self) -> bool:
        """Whether the answer must be a call."""
        match self.tool_choice:
            case AllowedToolChoice(allowed_tools=allowed):
                return allowed.mode == "required"
            case NamedTool():
                return True
        return self.tool_choice == "required"

    @property
    def parallel(self) -> bool | None:
        """Whether several calls may be made at once; a named function is called once."""
        return False if isinstance(self.tool_choice, NamedTool) else self.parallel_tool_calls


def chosen(functions: dict[str, Function], names: list[str]) -> dict[str, Function]:
    """Some of the functions.

    Raises:
        RequestError: one is not there.
    """
    for name in names:
        if name not in functions:
            raise RequestError(
                f"tool_choice names the function {name!r}; the tools have {', '.join(functions)}"
            )
    return {name: functions[name] for name in names}
