"""POST /v1/responses, without stored state."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.errors import QuatomError
from quatom.serving.answer import Answer
from quatom.serving.api_errors import ApiError, from_quatom, json_response
from quatom.serving.chat import start_turn
from quatom.serving.chat_protocol import ChatTemplateOptions, Message
from quatom.serving.generation import Generation, Service
from quatom.serving.prompt import turn_of
from quatom.serving.responses_input import messages_of
from quatom.serving.responses_items import ItemWriter
from quatom.serving.responses_protocol import ResponsesRequest
from quatom.serving.streaming import Chunks, EventStream, Frames, frame


async def create_response(service: Service, body: ResponsesRequest, http: HttpRequest) -> Response:
    """Answer a conversation, at once or as a stream."""
    model = service.check_model(body.model)
    params = body.params()
    options = ChatTemplateOptions.model_validate(
        {"chat_template_kwargs": body.chat_template_kwargs}
    ).model_copy(update=dict(body.tool_options()))
    messages = [Message.model_validate(message) for message in messages_of(body)]
    effort = None if body.reasoning is None else body.reasoning.effort
    turn = turn_of(messages, options, params.structured, effort)
    plan, generation = await start_turn(service, "resp", model, turn, params, http)
    answer = plan.answer()
    if body.stream:
        return EventStream(_events(generation, body, answer), events=_framed)
    await generation.finish()
    completion = generation.outputs[0].outputs[0]
    writer = ItemWriter()
    writer.add(answer.add(completion.text, finish_reason=completion.finish_reason))
    writer.finish(complete=completion.finish_reason != "length")
    return json_response(_response(generation, body, answer, writer))


def _response(
    generation: Generation,
    body: ResponsesRequest,
    answer: Answer,
    writer: ItemWriter,
    *,
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The response object so far."""
    reason = generation.outputs[0].outputs[0].finish_reason
    status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
    if error is not None:
        status = "failed"
    text = {"format": {"type": "text"}}
    if body.text is not None and body.text.format is not None:
        text = {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)}
    response = {
        "id": generation.id,
        "object": "response",
        "created_at": generation.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": generation.model,
        "output": writer.items,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": None if body.reasoning is None else body.reasoning.effort,
            "summary": None,
        },
        "store": False,
        "temperature": generation.params.temperature,
        "text": text,
        "tool_choice": _dumped(body.tool_choice) or "auto",
        "tools": [_dumped(tool) for tool in body.tools or ()],
        "top_p": generation.params.top_p,
        "truncation": "disabled",
    }
    if reason is not None:
        response["usage"] = _usage(generation, answer)
    return response


def _dumped(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _usage(generation: Generation, answer: Answer) -> dict[str, Any]:
    """Tokens; those of reasoning are counted in its text."""
    used = generation.outputs[0]
    reasoning = answer.parsed.reasoning
    encoder = generation.service.encoder
    num_reasoning = len(encoder.encode(reasoning, special=False)) if reasoning else 0
    num_input, num_output = len(used.prompt_token_ids), generation.num_completion_tokens
    return {
        "input_tokens": num_input,
        "input_tokens_details": {
            "cached_tokens": used.num_cached_tokens,
            "cache_write_tokens": used.num_cache_write_tokens,
        },
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": min(num_reasoning, num_output)},
        "total_tokens": num_input + num_output,
    }


async def _events(
    generation: Generation, body: ResponsesRequest, answer: Answer
) -> AsyncGenerator[dict[str, Any], None]:
    writer = ItemWriter()

    def lifecycle(name: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        made = _response(generation, body, answer, writer, error=error)
        # Later items would change what an event that is not sent yet says.
        return {"type": f"response.{name}", "response": {**made, "output": list(writer.items)}}

    yield lifecycle("created")
    yield lifecycle("in_progress")
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for _, delta in deltas:
                new = answer.add(delta.text, finish_reason=delta.finish_reason)
                for event in writer.add(new):
                    yield event
        complete = generation.outputs[0].outputs[0].finish_reason != "length"
        for event in writer.finish(complete=complete):
            yield event
        yield lifecycle("completed" if complete else "incomplete")
    except (ApiError, QuatomError) as failure:
        known = failure if isinstance(failure, ApiError) else from_quatom(failure)
        yield lifecycle("failed", {"code": "server_error", "message": known.message})


async def _framed(chunks: Chunks) -> Frames:
    """Events with a name and a number."""
    number = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            event = {**chunk, "sequence_number": number}
            number += 1
            yield b"event: %b\n%b" % (chunk["type"].encode(), frame(event))
