"""What happens to every request around its route: log line, request id, key, unexpected errors."""

import base64
import binascii
import hmac
import logging
import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quatom.serving.api_errors import ApiError

logger = logging.getLogger("quatom.serving")

OPEN_PATHS = ("/health", "/ping", "/metrics")
"""Answered without a key."""
STATUS = "quatom.status"
"""Where RequestLogMiddleware notes in the scope that a response has begun, and with what status."""


class ApiKeyMiddleware:
    """Asks for a key as a bearer token, or as the password of HTTP Basic, which browsers send.

    OPTIONS needs none: a browser asks that way whether it may send a key at all.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if (
            scope["type"] == "http"
            and scope["path"] not in OPEN_PATHS
            and scope["method"] != "OPTIONS"
        ):
            given = _given_key(Headers(scope=scope).get("authorization", ""))
            # compare_digest takes the same time wherever keys differ, and every key is compared.
            if not sum(hmac.compare_digest(given, key) for key in self._keys):
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


class UnexpectedErrorMiddleware:
    """Turns an exception that nobody expected into a 500, and logs it.

    Starlette's own handler answers outside of all middleware: without a request id, and without
    the headers that let a browser's page read the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 500; a response that has begun is cut off."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or scope.get(STATUS):
                raise
            logger.exception("a request failed unexpectedly")
            failure = ApiError(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"{type(error).__name__} while answering; the log has the details",
                kind="server_error",
                code="internal_error",
            )
            await failure.response()(scope, receive, send)


class RequestLogMiddleware:
    """One JSON line per request, and its id in the response's X-Request-ID."""

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
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[STATUS] = message["status"]
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
                            "status": scope.get(STATUS, 0),
                            "seconds": round(time.monotonic() - start, 4),
                        }
                    },
                )
