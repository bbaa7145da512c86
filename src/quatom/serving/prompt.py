"""Text, token ids and conversations -> token ids, and token ids -> the strings shown for them."""

import threading
from http import HTTPStatus
from typing import Any

from jinja2.exceptions import TemplateError

from quatom.serving.api_errors import ApiError
from quatom.serving.chat_protocol import ChatTemplateOptions, Message


class PromptEncoder:
    """A tokenizer and its chat template. Any thread may use it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A tokenizer's Rust core refuses to be changed while it works; `encode` may change it.
        self._lock = threading.Lock()
        self._strings: dict[int, str] = {}

    def encode(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """Token ids of a prompt; a list of ids stays as it is."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self._need()
        with self._lock:
            return list(tokenizer.encode(prompt, add_special_tokens=special))

    def encode_chat(self, messages: list[Message], options: ChatTemplateOptions) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Raises:
            ApiError: the model has no template, or the template refuses the conversation.
        """
        tokenizer = self._need()
        if getattr(tokenizer, "chat_template", None) is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST, "this model has no chat template: use /v1/completions"
            )
        goes_on = bool(options.continue_final_message)
        begins = options.add_generation_prompt
        try:
            # transformers renders templates in jinja2's immutable sandbox.
            text = tokenizer.apply_chat_template(
                [message.for_template() for message in messages],
                tools=options.tools,
                tokenize=False,
                add_generation_prompt=not goes_on if begins is None else begins,
                continue_final_message=goes_on,
                **_template_arguments(options.chat_template_kwargs),
            )
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"the chat template refuses these messages: {error}",
                param="messages",
            ) from error
        return self.encode(text, special=False)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special ones included."""
        return str(self._need().decode(token_ids, skip_special_tokens=False))

    def token_string(self, token_id: int) -> str:
        """How one token is shown; tokens that are no whole characters by the tokenizer's symbol."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        string = self._strings.get(token_id)
        if string is None:
            string = self.decode([token_id])
            if not string or "\ufffd" in string:
                string = str(self._tokenizer.convert_ids_to_tokens(token_id) or string)
            self._strings[token_id] = string
        return string

    def _need(self) -> Any:
        if self._tokenizer is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "this model has no tokenizer: give prompts as lists of token ids",
            )
        return self._tokenizer


def _template_arguments(given: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs, without the arguments that are not the template's own."""
    reserved = {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
    refused = sorted(reserved & (given or {}).keys())
    if refused:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"chat_template_kwargs may not hold {', '.join(refused)}",
            param="chat_template_kwargs",
        )
    return given or {}
