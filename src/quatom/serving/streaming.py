"""Server-sent events: one JSON object in each, an error object if it comes to that, [DONE]."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from anyio import CancelScope
from fastapi.responses import StreamingResponse
from starlette.types import Send

from quatom.errors import QuatomError
from quatom.serving.api_errors import ApiError, from_quatom

logger = logging.getLogger("quatom.serving")

DONE = b"data: [DONE]\n\n"

Chunks = AsyncGenerator[dict[str, Any], None]
Frames = AsyncGenerator[bytes, None]


async def events(chunks: Chunks) -> Frames:
    """Frame chunks."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield frame(chunk)
    except ApiError as error:
        yield frame(error.body())
    except QuatomError as error:
        yield frame(from_quatom(error).body())
    yield DONE


def frame(content: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: %b\n\n" % encode(content)


def encode(content: dict[str, Any]) -> bytes:
    """Compact JSON."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:  # a lone surrogate, which only ASCII can carry
        return json.dumps(content, separators=(",", ":")).encode()


async def joined(frames: Frames) -> Frames:
    """Frames as they come; those that have come together leave together.

    A write to a socket costs more than to make an event. Where the event loop falls behind, the
    tokens of several steps are there at once, and one write for all of them lets it catch up.
    """
    waiting: list[bytes] = []
    more = asyncio.Event()

    async def collect() -> None:
        async with aclosing(frames):
            async for one in frames:
                waiting.append(one)
                more.set()

    collecting = asyncio.ensure_future(collect())
    collecting.add_done_callback(lambda _: more.set())
    try:
        while not collecting.done() or waiting:
            await more.wait()
            more.clear()
            if waiting:
                content = b"".join(waiting)
                waiting.clear()
                yield content
        collecting.result()
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)


class EventStream(StreamingResponse):
    """Sends chunks as events. When the client vanishes the source is closed at once."""

    def __init__(self, chunks: Chunks, events: Callable[[Chunks], Frames] = events) -> None:
        """Send `chunks` as `events` frames them."""
        self._content = joined(events(chunks))
        super().__init__(
            self._content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def stream_response(self, send: Send) -> None:
        """Send everything; closing the content aborts what still runs."""
        try:
            await super().stream_response(send)
        finally:
            with CancelScope(shield=True):  # it may be a cancelled `send` that ends here
                await self._content.aclose()
