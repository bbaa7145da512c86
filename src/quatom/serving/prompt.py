"""Text, token ids and conversations -> token ids, and token ids -> the strings shown for them."""

from http import HTTPStatus
from typing import Any, TypeVar

from quatom.engine.sampling import StructuredOutput
from quatom.engine.text_stream import text_of
from quatom.engine.vocabulary import Vocabulary, vocabulary_of
from quatom.serving.api_errors import ApiError
from quatom.serving.chat_protocol import ChatTemplateOptions, Message
from quatom.serving.dialogue import Dialogue, DialogueStyle, Turn
from quatom.serving.fim import FillInTheMiddle
from quatom.serving.text_encoder import TextEncoder

Part = TypeVar("Part")

RESERVED = {
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
"""Arguments of transformers' apply_chat_template that chat_template_kwargs may not hold."""


class PromptEncoder:
    """A tokenizer and its way to converse. Any thread may use it."""

    def __init__(
        self,
        tokenizer: Any,
        style: DialogueStyle | None = None,
        *,
        max_tokens: int | None = None,
    ) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: None: the model has none.
            style: what is said of how its model converses.
            max_tokens: longer prompts are refused; None: none is.
        """
        self._tokenizer = tokenizer
        self._dialogue = Dialogue(tokenizer, style or DialogueStyle())
        self._texts = None if tokenizer is None else TextEncoder(tokenizer, max_tokens)
        self._fim = None if self._texts is None else FillInTheMiddle(tokenizer, self._texts)

    @property
    def dialogue(self) -> Dialogue:
        """How the model converses.

        Raises:
            ApiError: it has no tokenizer.
        """
        self._need(self._tokenizer)
        return self._dialogue

    def encode(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """Token ids of a prompt; a list of ids stays as it is.

        Raises:
            RequestError: the text is longer than the model can read.
        """
        if not isinstance(prompt, str):
            return prompt
        return self._need(self._texts).prompt_ids(prompt, special=special)

    def encode_all(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, which may be longer than a prompt."""
        return self._need(self._texts).ids(text, special=special)

    def encode_around(
        self, before: str | list[int], after: str, *, special: bool = True
    ) -> list[int]:
        """Token ids that ask for the text between two others.

        Raises:
            RequestError: the model was not trained for that.
        """
        return self._need(self._fim).encode(before, after, special=special)

    def ends_of_middle(self) -> list[int]:
        """Tokens that end what `encode_around` asks for."""
        return self._need(self._fim).stop_token_ids()

    def encode_chat(self, messages: list[Message], options: ChatTemplateOptions) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Raises:
            ApiError: the model has no template, or the template refuses the conversation.
        """
        return self.encode_all(self.dialogue.prompt(turn_of(messages, options)), special=False)

    def places(self, text: str, *, special: bool = True) -> list[int]:
        """Where each token of a text begins in it, after what the token before it took.

        Tokens that the tokenizer adds take nothing, and those of one character begin together.
        """
        encoding = self._need(self._texts).encoding(text, special=special)
        places, end = [], 0
        spans = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        for (start, stop), added in spans:
            places.append(end if added else min(start, end))
            end = max(end, stop)
        return places

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What single tokens are; None: there is no tokenizer."""
        return None if self._tokenizer is None else vocabulary_of(self._tokenizer)

    def decode(self, token_ids: list[int], *, final: bool = True) -> str:
        """Text of token ids, special ones included; not `final`: without an open character."""
        return text_of(vocabulary_of(self._need(self._tokenizer)), token_ids, final=final)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What one token adds to a text; None where the tokenizer has no such token."""
        return None if self.vocabulary is None else self.vocabulary.token_bytes(token_id)

    def token_string(self, token_id: int) -> str:
        r"""How one token is shown: its text, with bytes that are no characters as `\xe4`."""
        data = self.token_bytes(token_id)
        return f"token_id:{token_id}" if data is None else data.decode(errors="backslashreplace")

    @staticmethod
    def _need(part: Part | None) -> Part:
        if part is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "this model has no tokenizer: give prompts as lists of token ids",
            )
        return part


def turn_of(
    messages: list[Message],
    options: ChatTemplateOptions,
    structured: StructuredOutput | None = None,
    effort: str | None = None,
) -> Turn:
    """What a request says, for `Dialogue`.

    Args:
        messages: the conversation.
        options: how it becomes a prompt.
        structured: what the content must fit.
        effort: reasoning_effort, which some templates know.

    Raises:
        ApiError: chat_template_kwargs hold what is not the template's own.
        RequestError: a tool is not valid.
    """
    arguments = options.chat_template_kwargs or {}
    refused = sorted(RESERVED & arguments.keys())
    if refused:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"chat_template_kwargs may not hold {', '.join(refused)}",
            param="chat_template_kwargs",
        )
    return Turn(
        messages=[message.for_template() for message in messages],
        tools=options.tools_for_template(),
        functions=options.callable_functions(),
        call_required=options.call_required,
        parallel=options.parallel,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=bool(options.continue_final_message),
        arguments=arguments if effort is None else {"reasoning_effort": effort, **arguments},
        structured=structured,
    )
