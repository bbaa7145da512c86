"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.engine.outputs import CompletionOutput, SequenceDelta
from quatom.serving.api_errors import json_response
from quatom.serving.chat_protocol import ChatCompletionRequest
from quatom.serving.generation import Generation, Service
from quatom.serving.responses import chat_logprobs
from quatom.serving.streaming import EventStream


async def create_chat_completion(
    service: Service, body: ChatCompletionRequest, http: HttpRequest
) -> Response:
    """Answer a conversation, at once or as a stream."""
    model = service.check_model(body.model)
    generation = Generation(service, "chatcmpl", model, body.params(), http)
    if body.tool_choice == "none":
        body = body.model_copy(update={"tools": None})
    token_ids = await asyncio.to_thread(service.encoder.encode_chat, body.messages, body)
    await generation.prepare([token_ids])
    if body.stream:
        return EventStream(_chunks(generation, body))
    await generation.finish()
    return json_response(
        {
            **_head(generation, "chat.completion"),
            "choices": [_choice(generation, body, c) for c in generation.outputs[0].outputs],
            "usage": generation.usage(),
        }
    )


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
    }


def _choice(
    generation: Generation, body: ChatCompletionRequest, completion: CompletionOutput
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        logprobs = chat_logprobs(completion.logprobs, generation.service.encoder)
    choice: dict[str, Any] = {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        choice["stop_reason"] = completion.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


async def _chunks(
    generation: Generation, body: ChatCompletionRequest
) -> AsyncGenerator[dict[str, Any], None]:
    options = body.stream_options
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        made = {**head, "choices": [choice]}
        return {**made, "usage": generation.usage()} if continuous else made

    head = _head(generation, "chat.completion.chunk")
    for index in range(generation.params.n):
        first = {"role": "assistant", "content": ""}
        yield chunk({"index": index, "delta": first, "finish_reason": None})
    async with aclosing(generation.deltas()) as deltas:
        async for _, delta in deltas:
            silent = not delta.text and not delta.logprobs and not body.return_token_ids
            if silent and delta.finish_reason is None:
                continue  # half a character, or perhaps the start of a stop string
            yield chunk(_delta_choice(generation, body, delta))
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _delta_choice(
    generation: Generation, body: ChatCompletionRequest, delta: SequenceDelta
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": delta.index,
        "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
        "finish_reason": delta.finish_reason,
    }
    if delta.logprobs:
        choice["logprobs"] = chat_logprobs(list(delta.logprobs), generation.service.encoder)
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    return choice
