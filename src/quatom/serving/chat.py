"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.engine.outputs import CompletionOutput, SequenceDelta
from quatom.engine.sampling import SamplingParams
from quatom.serving.answer import Answer, AnswerDelta
from quatom.serving.api_errors import json_response
from quatom.serving.chat_protocol import ChatCompletionRequest
from quatom.serving.dialogue import Plan, Turn
from quatom.serving.generation import Generation, Service
from quatom.serving.prompt import turn_of
from quatom.serving.responses import chat_logprobs
from quatom.serving.streaming import EventStream
from quatom.serving.threads import in_thread


async def create_chat_completion(
    service: Service, body: ChatCompletionRequest, http: HttpRequest
) -> Response:
    """Answer a conversation, at once or as a stream."""
    model = service.check_model(body.model)
    params = body.params()
    turn = turn_of(body.messages, body, params.structured, body.reasoning_effort)
    plan, generation = await start_turn(service, "chatcmpl", model, turn, params, http)
    if body.stream:
        return EventStream(_chunks(generation, body, plan))
    await generation.finish()
    return json_response(
        {
            **_head(generation, "chat.completion"),
            "choices": [_choice(generation, body, plan, c) for c in generation.outputs[0].outputs],
            "usage": generation.usage(),
        }
    )


async def start_turn(
    service: Service,
    kind: str,
    model: str,
    turn: Turn,
    params: SamplingParams,
    http: HttpRequest,
) -> tuple[Plan, Generation]:
    """Make the prompt of a turn and check its request; nothing runs yet."""
    encoder = service.encoder

    def encode() -> tuple[Plan, list[int]]:
        plan = encoder.dialogue.plan(turn)
        return plan, encoder.encode(plan.prompt, special=False)

    plan, token_ids = await in_thread(http, encode)
    params = replace(params, structured=plan.structured, shown_token_ids=plan.shown_tokens)
    generation = Generation(service, kind, model, params, http)
    await generation.prepare([token_ids])
    return plan, generation


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
    }


def _choice(
    generation: Generation, body: ChatCompletionRequest, plan: Plan, completion: CompletionOutput
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        logprobs = chat_logprobs(completion.logprobs, generation.service.encoder)
    answer = plan.answer()
    answer.add(completion.text, finish_reason=completion.finish_reason)
    choice: dict[str, Any] = {
        "index": completion.index,
        "message": _message(answer),
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason(completion.finish_reason),
    }
    if completion.stop_reason is not None:
        choice["stop_reason"] = completion.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


def _message(answer: Answer) -> dict[str, Any]:
    parsed = answer.parsed
    content = None if parsed.calls and not parsed.content else parsed.content
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        message["tool_calls"] = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call_id, call in zip(answer.call_ids, parsed.calls, strict=True)
        ]
    return message


async def _chunks(
    generation: Generation, body: ChatCompletionRequest, plan: Plan
) -> AsyncGenerator[dict[str, Any], None]:
    options = body.stream_options
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        made = {**head, "choices": [choice]}
        return {**made, "usage": generation.usage()} if continuous else made

    head = _head(generation, "chat.completion.chunk")
    answers = [plan.answer() for _ in range(generation.params.n)]
    for index in range(generation.params.n):
        first = {"role": "assistant", "content": ""}
        yield chunk({"index": index, "delta": first, "finish_reason": None})
    async with aclosing(generation.deltas()) as deltas:
        async for _, delta in deltas:
            answer = answers[delta.index]
            new = answer.add(delta.text, finish_reason=delta.finish_reason)
            silent = not new and not delta.logprobs and not body.return_token_ids
            if silent and delta.finish_reason is None:
                continue  # half a character, or what may become a stop string or a call
            yield chunk(_delta_choice(generation, body, delta, new, answer))
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _delta_choice(
    generation: Generation,
    body: ChatCompletionRequest,
    delta: SequenceDelta,
    new: AnswerDelta,
    answer: Answer,
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": delta.index,
        "delta": _message_delta(new) or ({} if delta.finish_reason else {"content": ""}),
        "finish_reason": answer.finish_reason(delta.finish_reason),
    }
    if delta.logprobs:
        choice["logprobs"] = chat_logprobs(list(delta.logprobs), generation.service.encoder)
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    return choice


def _message_delta(new: AnswerDelta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if new.reasoning:
        delta["reasoning_content"] = new.reasoning
    if new.content:
        delta["content"] = new.content
    if new.calls:
        delta["tool_calls"] = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is None
            else {
                "index": call.index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in new.calls
        ]
    return delta
