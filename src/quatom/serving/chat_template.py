"""ChatTemplate: a conversation -> the prompt, and never one that leaves out what was said.

A template that cannot express something, such as a system message or a tool, usually drops it
without a word. So every conversation is rendered twice: once as it is, and once with a mark in the
place of each message's content, each tool's name and each call. A mark that is not in the text
stands for something that the model would not be told, and the request is refused.
"""

import contextlib
import copy
import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser

from quatom.errors import RequestError
from quatom.serving.api_errors import ApiError

Message = dict[str, Any]

_KNOWS_DEVELOPER = re.compile(r"""['"]developer['"]""")
_ONE_CALL = "only supports single tool-calls"
_TOOLS_IN_MESSAGE = re.compile(r"""message\[['"]tools['"]\]|message\.tools\b""")


class _Generation(Extension):
    """transformers' tag around what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def read_chat_template(path: Path) -> str:
    """The text of a template file.

    Raises:
        RequestError: it cannot be read, or is no Jinja template.
    """
    try:
        text = path.read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the chat template {path}: {error}") from error
    except TemplateError as error:
        raise RequestError(f"{path} is no chat template: {_one_line(error)}") from error
    return text


class ChatTemplate:
    """A tokenizer's chat template. Any thread may use it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def exists(self) -> bool:
        """Whether the model has one."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    @property
    def one_call_at_a_time(self) -> bool:
        """Whether the template refuses messages with more than one call (Llama 3)."""
        return _ONE_CALL in self.text(tools=True)

    def text(self, *, tools: bool) -> str:
        """The template's own text; a model may have another one for tools.

        Raises:
            ApiError: the model has none.
        """
        if not self.exists:
            raise _refusal("this model has no chat template: use /v1/completions")
        try:
            return str(self._tokenizer.get_chat_template(tools=[{}] if tools else None))
        except ValueError as error:  # it has several, and none for this
            raise _refusal(_one_line(error)) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        arguments: dict[str, Any],
    ) -> str:
        """The prompt.

        Args:
            messages: as the request has them; content is a string.
            tools: what may be called, in OpenAI's form.
            add_generation_prompt: begin the answer.
            continue_final_message: leave the last message open, to be continued.
            arguments: variables of the template.

        Raises:
            ApiError: there is no template, it fails, or it leaves something out.
        """
        template = self.text(tools=tools is not None)
        known = [_for_template(message, template) for message in messages]
        if tools is not None and _TOOLS_IN_MESSAGE.search(template):
            known = _with_tools_in_message(known, tools)

        def rendered(messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **arguments,
                )
            )

        try:
            # transformers renders templates in jinja2's immutable sandbox.
            text = rendered(known, tools)
        except Exception as error:  # templates are programs: they fail in every way there is
            raise _refusal(
                f"the chat template refuses these messages: {_one_line(error)}"
            ) from error
        try:
            marked, marked_tools, wanted = _marked(known, tools)
            probe = rendered(marked, marked_tools)
        except Exception:  # the template looks at what is said: it cannot be asked this way
            return text
        for mark, what in wanted.items():
            if mark not in probe:
                raise _refusal(
                    f"the chat template of this model leaves out {what}: leave it out too"
                )
        return text


def _for_template(message: Message, template: str) -> Message:
    """Roles and arguments as templates expect them."""
    made = dict(message)
    if made["role"] == "developer" and not _KNOWS_DEVELOPER.search(template):
        made["role"] = "system"
    if "reasoning" in made:
        made.setdefault("reasoning_content", made["reasoning"])
    if made.get("tool_calls"):
        made["tool_calls"] = [_with_object(call) for call in made["tool_calls"]]
    else:
        made.pop("tool_calls", None)
    return made


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """The call, its arguments as an object if they are the text of one."""
    function = dict(call["function"])
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        # What a model wrote wrongly is shown to it as it was.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments, strict=False)
    function["arguments"] = {} if arguments is None else arguments
    return {**call, "function": function}


def _with_tools_in_message(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Phi-4's way: the system message holds the functions as a JSON text."""
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": functions}, *messages[1:]]


def _marked(
    messages: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[list[Message], list[dict[str, Any]] | None, dict[str, str]]:
    """Messages and tools with marks in them, and what each mark stands for."""
    wanted: dict[str, str] = {}

    def mark(what: str) -> str:
        made = f"quatommark{len(wanted)}x"
        wanted[made] = what
        return made

    marked = copy.deepcopy(messages)
    for i, message in enumerate(marked):
        calls = message.get("tool_calls", ())
        # Templates show either a call or what was said beside it.
        if message["content"].strip() and not calls:
            message["content"] = mark(f"message {i} (role {message['role']!r})")
        for call in calls:
            call["function"]["name"] = mark(f"the tool calls of message {i}")
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict) and arguments:
                key = next(iter(arguments))
                arguments[key] = mark(f"the arguments of tool calls in message {i}")
    if tools is None:
        return marked, None, wanted
    offered = copy.deepcopy(tools)
    for tool in offered:
        tool["function"]["name"] = mark("tools")
    if marked and "tools" in marked[0]:
        marked[0]["tools"] = json.dumps([tool["function"] for tool in offered])
    return marked, offered, wanted


def _refusal(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param="messages")


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
