"""POST /v1/completions."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.engine.outputs import CompletionOutput, RequestOutput, SequenceDelta
from quatom.serving.api_errors import json_response
from quatom.serving.generation import Generation, Service
from quatom.serving.protocol import CompletionRequest
from quatom.serving.responses import completion_logprobs
from quatom.serving.streaming import EventStream


async def create_completion(
    service: Service, body: CompletionRequest, http: HttpRequest
) -> Response:
    """Complete every prompt, at once or as a stream."""
    model = service.check_model(body.model)
    generation = Generation(service, "cmpl", model, body.params(), http)
    special = body.add_special_tokens is not False
    prompts = await asyncio.to_thread(
        lambda: [service.encoder.encode(p, special=special) for p in body.prompts()]
    )
    await generation.prepare(prompts)
    echoes = [
        _echo_text(service, body, p, ids) for p, ids in zip(body.prompts(), prompts, strict=True)
    ]
    if body.stream:
        return EventStream(_chunks(generation, body, echoes))
    await generation.finish()
    if body.max_tokens == 0:
        for output in generation.outputs:
            for completion in output.outputs:
                _drop_generated(completion)
    choices = [
        _choice(generation, body, i, echo + completion.text, completion, output)
        for i, (echo, output) in enumerate(zip(echoes, generation.outputs, strict=True))
        for completion in output.outputs
    ]
    return json_response({**_head(generation), "choices": choices, "usage": generation.usage()})


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": generation.model,
    }


def _echo_text(
    service: Service, body: CompletionRequest, prompt: str | list[int], token_ids: list[int]
) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else service.encoder.decode(token_ids)


def _drop_generated(completion: CompletionOutput) -> None:
    """max_tokens 0: the one token that was generated is not shown."""
    completion.text, completion.token_ids, completion.finish_reason = "", [], "length"
    if completion.logprobs is not None:
        completion.logprobs = []


def _choice(
    generation: Generation,
    body: CompletionRequest,
    prompt: int,
    text: str,
    completion: CompletionOutput,
    output: RequestOutput,
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        entries, given = completion.logprobs, None
        if body.echo:
            entries = [*(output.prompt_logprobs or []), *entries]
            given = output.prompt_token_ids[0]
        logprobs = completion_logprobs(entries, generation.service.encoder, 0, given=given)
    choice: dict[str, Any] = {
        "index": prompt * generation.params.n + completion.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        choice["stop_reason"] = completion.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = completion.token_ids
        choice["prompt_token_ids"] = output.prompt_token_ids
    return choice


async def _chunks(
    generation: Generation, body: CompletionRequest, echoes: list[str]
) -> AsyncGenerator[dict[str, Any], None]:
    options = body.stream_options
    head = _head(generation)
    offsets: dict[int, int] = {}  # characters sent of each choice
    async with aclosing(generation.deltas()) as deltas:
        async for prompt, delta in deltas:
            index = prompt * generation.params.n + delta.index
            echo = echoes[prompt] if index not in offsets else ""
            offset = offsets.setdefault(index, 0)
            choice = _delta_choice(generation, body, index, delta, echo, offset)
            offsets[index] += len(choice["text"])
            silent = not choice["text"] and choice["logprobs"] is None
            if silent and delta.finish_reason is None and not body.return_token_ids:
                continue  # half a character, or perhaps the start of a stop string
            chunk = {**head, "choices": [choice]}
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = generation.usage()
            yield chunk
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _delta_choice(
    generation: Generation,
    body: CompletionRequest,
    index: int,
    delta: SequenceDelta,
    echo: str,
    offset: int,
) -> dict[str, Any]:
    shown = body.max_tokens != 0
    text = echo + (delta.text if shown else "")
    logprobs = None
    if body.logprobs is not None:
        entries, given = list(delta.logprobs) if shown else [], None
        if body.echo and delta.prompt_logprobs is not None:
            prompt_ids = generation.outputs[index // generation.params.n].prompt_token_ids
            entries, given = [*delta.prompt_logprobs, *entries], prompt_ids[0]
        logprobs = completion_logprobs(entries, generation.service.encoder, offset, given=given)
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
    }
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    return choice
