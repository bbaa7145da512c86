"""LLM: offline generation for many prompts at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quatom.arguments import Size, check, checked, shown
from quatom.checkpoint.chat import render_chat
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.outputs import CompletionOutput, RequestOutput
from quatom.engine.requests import Request
from quatom.engine.sampling import SamplingParams
from quatom.errors import EngineError, RequestError
from quatom.loading import load
from quatom.ops.backend import Backend
from quatom.placement import usable_device
from quatom.recipe import Recipe

Prompt = str | list[int]
_NAMES_AND_LIMITS = (
    *("model", "device", "dtype", "backend"),  # `load` checks them,
    *("max_num_seqs", "max_model_len", "kv_cache_memory"),  # and EngineConfig these
)
_BYTES = bytes | bytearray | memoryview


class LLM:
    """Generates text with one model, in this process.

    Example:
        >>> llm = LLM("SmolLM2-135M-w4a4kv4")
        >>> llm.generate(["The capital of France is"], SamplingParams(temperature=0.0))[0].text
    """

    @checked(EngineError, but=_NAMES_AND_LIMITS)
    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str | Backend | None = None,
        config: EngineConfig | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        kv_cache_memory: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Quatom checkpoint, Hugging Face folder, GGUF file or hub id.
            device: where to run; None: the GPU if there is one, else the CPU.
            dtype: number format of what is not quantized, as in `quatom.load`.
            backend: implementation of the operations; None picks by device.
            config: limits of the engine; the three arguments below override its fields.
            max_num_seqs: sequences that run at once.
            max_model_len: longest sequence in tokens.
            kv_cache_memory: bytes of KV cache.

        Raises:
            CheckpointError: files of the model are missing or damaged.
            ModelError: the architecture or a configuration key is not supported.
            BackendError: the device is not available, or a kernel cannot run the recipe.
            EngineError: the limits do not fit each other or the memory.
        """
        options: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "kv_cache_memory": kv_cache_memory,
        }
        given = {name: value for name, value in options.items() if value is not None}
        limits = replace(config or EngineConfig(), **given)
        limits.check_memory(usable_device(device))
        self.engine = Engine(load(model, device=device, dtype=dtype, backend=backend), limits)

    @property
    def recipe(self) -> Recipe:
        """How the model is quantized."""
        return self.engine.recipe

    @classmethod
    @checked(EngineError)
    def from_engine(cls, engine: Engine) -> "LLM":
        """An LLM around an engine that exists already.

        Raises:
            EngineError: it is no engine.
        """
        llm = cls.__new__(cls)
        llm.engine = engine
        return llm

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds.

        Raises:
            RequestError: the prompt is neither text nor a list of token ids, or it is text that is
                no Unicode or that the model has no tokenizer for.
        """
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.engine.tokenizer is None:
            raise RequestError("this model has no tokenizer: give prompts as lists of token ids")
        _check_characters(prompt)
        return list(self.engine.tokenizer.encode(prompt))

    @checked(RequestError, but=("prompts",))
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt; results are in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; a single one is allowed too.
            params: one for all prompts, or one for each; None: the defaults of SamplingParams.
            progress: show a bar on stderr.

        Raises:
            RequestError: a prompt or a parameter is invalid, or their numbers differ.
        """
        every = _prompt_list(prompts)
        each = _one_for_each(every, params)
        outputs: dict[str, RequestOutput] = {}
        requests = []
        for i, (prompt, wanted) in enumerate(zip(every, each, strict=True)):
            token_ids = self.encode(prompt)
            requests.append(self.engine.make_request(f"generate-{i}", token_ids, wanted))
            outputs[f"generate-{i}"] = empty_output(f"generate-{i}", prompt, token_ids, wanted)
        for request in requests:
            self.engine.add(request)
        try:
            self._run(outputs, sum(p.n for p in each), progress)
        except BaseException:  # an interrupt too: the engine must be usable afterwards
            for request_id in outputs:
                self.engine.abort(request_id)
            raise
        return list(outputs.values())

    @checked(RequestError, but=("prompt",))
    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt, piece by piece; `"".join` of the pieces is the whole text.

        A caller who stops early ends the request: its KV blocks are free again.

        Args:
            prompt: a text or a list of token ids.
            params: None: the defaults of SamplingParams; `n` must be 1.

        Yields:
            New text, as soon as it is certain.

        Raises:
            RequestError: the prompt or a parameter is invalid, or the engine runs other requests.
            EngineError: the engine could not go on.
        """
        params = SamplingParams() if params is None else params
        if params.n != 1:
            raise RequestError(f"a stream is of one completion, got n {params.n}")
        if self.engine.has_work:
            raise RequestError("another stream of this LLM is open: read it to its end or close it")
        return self._stream(self.engine.make_request("stream", self.encode(prompt), params))

    def _stream(self, request: Request) -> Iterator[str]:
        self.engine.add(request)
        try:
            while self.engine.has_work:
                for delta in self.engine.step():
                    if delta.error is not None:
                        raise EngineError(delta.error)
                    if delta.text:
                        yield delta.text
        finally:
            self.engine.abort(request.request_id)
            while self.engine.has_work:  # the step that was launched ahead
                self.engine.step()

    @checked(RequestError, but=("messages",))
    def chat(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer a conversation, through the model's chat template.

        Args:
            messages: objects with `role` and `content`, as in OpenAI's API.
            params: None: the defaults of SamplingParams.

        Raises:
            RequestError: the model has no tokenizer, or a parameter is invalid.
            ModelError: the model has no chat template, or the template fails on these messages.
        """
        return self.generate(self.encode_chat(messages), params)[0]

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation and of the beginning of the assistant's answer.

        Raises:
            RequestError: the model has no tokenizer, or the messages are no Unicode text.
            ModelError: the model has no chat template, or the template fails on these messages.
        """
        if (tokenizer := self.engine.tokenizer) is None:
            raise RequestError("this model has no tokenizer, and so no chat template")
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        _check_characters(text)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def _run(self, outputs: dict[str, RequestOutput], total: int, progress: bool) -> None:
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
        )
        num_tokens = 0
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("", total=total, tokens=0)
            while self.engine.has_work:
                finished = 0
                for delta in self.engine.step():
                    outputs[delta.request_id].add(delta)
                    finished += delta.finish_reason is not None
                    num_tokens += len(delta.token_ids)
                if finished:
                    bar.update(task, advance=finished, tokens=num_tokens)


def empty_output(
    request_id: str, prompt: Prompt, token_ids: list[int], params: SamplingParams
) -> RequestOutput:
    """The result of a request before its first token."""
    wants_logprobs = params.logprobs is not None
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=token_ids,
        outputs=[
            CompletionOutput(index=i, logprobs=[] if wants_logprobs else None)
            for i in range(params.n)
        ],
    )


def _check_characters(text: str) -> None:
    """Raise RequestError if a text holds half of a surrogate pair, which no tokenizer reads."""
    check("the text", text, Annotated[str, Size(0)], RequestError)


def _token_ids(prompt: Any) -> list[int]:
    """The integers of a prompt, those of numpy and torch too."""
    try:
        values = prompt.tolist() if isinstance(prompt, torch.Tensor | np.ndarray) else prompt
        if not isinstance(values, Sequence) or isinstance(values, str | _BYTES):
            raise TypeError  # one may iterate over it nevertheless
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [index(value) for value in values]
    except TypeError:
        raise RequestError(
            f"a prompt is a text or a list of token ids, got {shown(prompt)}; messages go to "
            "chat(), or through encode_chat() to generate() and stream()"
        ) from None


def _prompt_list(prompts: Any) -> list[Any]:
    """What are prompts one by one; `encode` refuses what is none."""
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str | _BYTES)
    if not several or any(isinstance(item, Integral) for item in prompts):
        return [prompts]
    return list(prompts)


def _one_for_each(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts but {len(params)} SamplingParams")
    return list(params)
