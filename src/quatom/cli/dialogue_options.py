"""Options about a model's way to converse, which serve and run-batch share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quatom.serving.dialogue import DialogueStyle

ChatTemplateOption = Annotated[
    Path | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="Jinja template in the place of the model's own."
    ),
]
ToolFormatOption = Annotated[
    str | None,
    typer.Option(
        "--tool-format", help="How the model writes tool calls; default: as its template shows."
    ),
]
ReasoningFormatOption = Annotated[
    str,
    typer.Option("--reasoning-format", help="auto, none or deepseek: what counts as reasoning."),
]


def read_style(
    chat_template: Path | None, tool_format: str | None, reasoning_format: str
) -> "DialogueStyle":
    """The options as the server takes them.

    Raises:
        RequestError: the file is no template, or a format is not known.
    """
    from quatom.serving.chat_template import read_chat_template
    from quatom.serving.dialogue import DialogueStyle
    from quatom.serving.reasoning import check_reasoning_format
    from quatom.serving.tools.registry import format_named

    if tool_format is not None:
        format_named(tool_format)
    return DialogueStyle(
        chat_template=None if chat_template is None else read_chat_template(chat_template),
        tool_format=tool_format,
        reasoning_format=check_reasoning_format(reasoning_format),
    )
