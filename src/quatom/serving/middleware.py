"""What happens to every request before a route sees it: key, log line, request id."""

import base64
import binascii
import hmac
import json
import logging
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quatom.serving.api_errors import ApiError

logger = logging.getLogger("quatom.serving")

OPEN_PATHS = ("/health", "/metrics")
"""Answered without a key."""


class ApiKeyMiddleware:
    """Asks for the key as a bearer token, or as the password of HTTP Basic, which browsers send."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = _given_key(Headers(scope=scope).get("authorization", ""))
            # compare_digest takes the same time wherever the keys differ.
            if not hmac.compare_digest(given, self._key):
                refusal = ApiError(
                    HTTPStatus.UNAUTHORIZED,
                    "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": 'Basic realm="quatom"'},
                )
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _given_key(authorization: str) -> bytes:
    kind, _, value = authorization.partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value.encode("latin-1")  # as the header's bytes were decoded
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class RequestLogMiddleware:
    """One JSON line a request, and its id in the response's X-Request-ID."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Time the request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = given if usable else uuid.uuid4().hex
        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in OPEN_PATHS:
                logger.info(
                    "request",
                    extra={
                        "fields": {
                            "request_id": request_id,
                            "method": scope["method"],
                            "path": scope["path"],
                            "status": status,
                            "seconds": round(time.monotonic() - start, 4),
                        }
                    },
                )


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, event and the record's own fields."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
