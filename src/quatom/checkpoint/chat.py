"""Conversations as text, by a model's chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quatom.arguments import shown
from quatom.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[dict[str, Any]],  # role and content each
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation; special tokens are in it.

    Raises:
        ModelError: there is no template, a message is no object with a role, or the template fails.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template: give plain text instead of messages")
    # Templates differ in what they make of such messages: some leave them out.
    if not isinstance(messages, list | tuple):
        raise ModelError(f"messages must be a list, got {shown(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ModelError(
                f"messages[{index}] must be an object with a role, got {shown(message)}"
            )
        if not _has_content(message):
            raise ModelError(
                f"messages[{index}] must have a content, a text or a list of parts, got "
                f"{shown(message)}"
            )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the model's chat template fails on these messages ({type(error).__name__}: "
            f"{reason}); mend chat_template.jinja or tokenizer_config.json, or give plain text"
        ) from error
    return str(text)


def _has_content(message: dict[str, Any]) -> bool:
    """Whether there is something to say; calls of tools and reasoning may stand for it."""
    content = message.get("content")
    if content is None:
        return any(value for key, value in message.items() if key not in ("role", "name"))
    if isinstance(content, list | tuple):
        return all(isinstance(part, dict) for part in content)
    return isinstance(content, str)
