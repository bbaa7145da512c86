"""How a route reads its body and describes itself."""

from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError

from quatom.serving import responses
from quatom.serving.api_errors import ApiError, from_validation
from quatom.serving.openapi import request_body

Body = TypeVar("Body", bound=BaseModel)

# The body of a stream's answer; the schema is that of one event.
_EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}


async def read_body(http: Request, model: type[Body], limit: int) -> Body:
    """The request's body, checked.

    Raises:
        ApiError: it is too large, no JSON, or does not fit `model`.
    """
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {limit} bytes",
                code="body_too_large",
            )
        parts.append(part)
    http.state.body_bytes = size
    try:
        return model.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise from_validation(error) from error


def post_route(
    app: FastAPI,
    path: str,
    body: type[BaseModel],
    response: type[BaseModel],
    *,
    streams: bool = False,
) -> Any:
    """A decorator for a POST route; `streams`: its answer is a stream where the body says so."""
    done: dict[str, Any] = {"model": response}
    if streams:
        done["content"] = _EVENTS
    return app.post(
        path,
        openapi_extra=request_body(body),
        response_model=None,
        responses={200: done, **errors(400, 404, 413, 429, 500, 503)},
    )


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of error responses."""
    return {status: {"model": responses.ErrorResponse} for status in statuses}
