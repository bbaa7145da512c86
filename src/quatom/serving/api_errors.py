"""Errors as OpenAI sends them: {"error": {"message", "type", "param", "code"}}."""

import json
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from quatom.errors import EngineError, QueueFullError, RequestError

RETRY_AFTER_S = 1
MAX_ERRORS = 1000
MESSAGES = {
    "extra_forbidden": ("this request has no such field", "unknown_parameter"),
    "none_required": ("this field is not supported: leave it out", "unsupported_parameter"),
}
"""Errors of pydantic -> what is said instead, and OpenAI's code."""


class ApiError(Exception):
    """A response with an error object, raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """The whole response."""
        return json_response(self.body(), status=self.status, headers=self.headers)


def json_response(
    content: Any, *, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    """JSON in ASCII, which can carry any string, even one with lone surrogates."""
    return Response(
        json.dumps(content, separators=(",", ":")),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def from_validation(error: ValidationError) -> ApiError:
    """One thing that pydantic found, by the field's name.

    Of a value that fits none of several types, it is what the type that came closest says.
    """
    if error.error_count() > MAX_ERRORS:  # to list them all would take seconds
        message = f"the body has {error.error_count()} wrong or unknown fields"
        return ApiError(HTTPStatus.BAD_REQUEST, message, code="invalid_value")
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=lambda e: (e["type"] == "too_long", len(e["loc"])))
    path = [str(part) for part in first["loc"]]
    message, code = MESSAGES.get(
        first["type"], (first["msg"].removeprefix("Value error, "), "invalid_value")
    )
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"{'.'.join(path)}: {message}" if path else message,
        param=".".join(path) or None,
        code="invalid_json" if first["type"] == "json_invalid" else code,
    )


def from_quatom(error: Exception) -> ApiError:
    """What the engine refuses: 400, 429 when its queue is full, 500 when it broke."""
    if isinstance(error, RequestError):
        too_long = "model's limit" in str(error)
        return ApiError(
            HTTPStatus.BAD_REQUEST,
            str(error),
            code="context_length_exceeded" if too_long else "invalid_value",
        )
    if isinstance(error, QueueFullError):
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            str(error),
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, EngineError):
        status = HTTPStatus.SERVICE_UNAVAILABLE
    return ApiError(status, str(error), kind="server_error", code="engine_error")
