"""POST /v1/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.engine.outputs import CompletionOutput, SequenceDelta, TokenLogprobs
from quatom.serving.api_errors import json_response
from quatom.serving.completion_logprobs import CompletionLogprobs, Echo, joined, make_echo
from quatom.serving.generation import Generation, Service
from quatom.serving.protocol import CompletionRequest
from quatom.serving.streaming import EventStream
from quatom.serving.threads import in_thread


async def create_completion(
    service: Service, body: CompletionRequest, http: HttpRequest
) -> Response:
    """Complete every prompt, at once or as a stream."""
    model = service.check_model(body.model)
    params = body.params()
    special = body.add_special_tokens is not False

    def read_prompts() -> tuple[list[list[int]], list[Echo]]:
        encoder, given = service.encoder, body.prompts()
        if body.suffix:
            prompts = [encoder.encode_around(p, body.suffix, special=special) for p in given]
        else:
            prompts = [encoder.encode(prompt, special=special) for prompt in given]
        return prompts, [make_echo(encoder, body, p) if body.echo else Echo() for p in given]

    prompts, echoes = await in_thread(http, read_prompts)
    if body.suffix and not params.ignore_eos:
        ends = (*params.stop_token_ids, *service.encoder.ends_of_middle())
        params = replace(params, stop_token_ids=ends)
    generation = Generation(service, "cmpl", model, params, http)
    await generation.prepare(prompts, shorten=body.max_tokens is None)
    choices = _Choices(generation, body, echoes)
    if body.stream:
        return EventStream(_chunks(generation, body, choices))
    await generation.finish()
    made = []
    for i, output in enumerate(generation.outputs):
        for completion in output.outputs:
            choice = choices.make(i, completion, output.prompt_logprobs)
            if body.return_token_ids:
                choice["prompt_token_ids"] = output.prompt_token_ids
            made.append(choice)
    return json_response({**_head(generation), "choices": made, "usage": generation.usage()})


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": generation.model,
    }


class _Choices:
    """Makes choice objects of whole completions, or of their deltas as they come."""

    def __init__(self, generation: Generation, body: CompletionRequest, echoes: list[Echo]) -> None:
        self._generation = generation
        self._body = body
        self._echoes = echoes
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()

    def make(
        self,
        prompt: int,
        part: CompletionOutput | SequenceDelta,
        prompt_logprobs: Sequence[TokenLogprobs] | None,
    ) -> dict[str, Any]:
        """The object of a completion of prompt number `prompt`, or of the next part of it."""
        index = prompt * self._generation.params.n + part.index
        echo = "" if index in self._begun else self._echoes[prompt].text
        self._begun.add(index)
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + part.text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
        }
        if self._body.logprobs is not None:
            choice["logprobs"] = self._write_logprobs(index, prompt, part, prompt_logprobs)
        if part.stop_reason is not None:
            choice["stop_reason"] = part.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
        return choice

    def _write_logprobs(
        self,
        index: int,
        prompt: int,
        part: CompletionOutput | SequenceDelta,
        prompt_logprobs: Sequence[TokenLogprobs] | None,
    ) -> dict[str, Any]:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(
                self._generation.service.encoder,
                self._generation.outputs[prompt].prompt_token_ids,
                self._generation.params,
                self._echoes[prompt],
            )
        writer = self._logprobs[index]
        generated = writer.next(part.logprobs or ())
        if not self._body.echo or prompt_logprobs is None:
            return generated
        return joined(writer.prompt(prompt_logprobs), generated)


async def _chunks(
    generation: Generation, body: CompletionRequest, choices: _Choices
) -> AsyncGenerator[dict[str, Any], None]:
    options = body.stream_options
    head = _head(generation)
    async with aclosing(generation.deltas()) as deltas:
        async for prompt, delta in deltas:
            choice = choices.make(prompt, delta, delta.prompt_logprobs)
            silent = not choice["text"] and choice["logprobs"] is None
            if silent and delta.finish_reason is None and not body.return_token_ids:
                continue  # half a character, or perhaps the start of a stop string
            chunk = {**head, "choices": [choice]}
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = generation.usage()
            yield chunk
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": generation.usage()}
