"""Server-sent events: one JSON object a chunk, an error object if it comes to that, [DONE]."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from quatom.errors import QuatomError
from quatom.serving.api_errors import ApiError, from_quatom

logger = logging.getLogger("quatom.serving")


Chunks = AsyncGenerator[dict[str, Any], None]


async def events(chunks: Chunks) -> AsyncIterator[str]:
    """Frame chunks."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield frame(chunk)
    except ApiError as error:
        yield frame(error.body())
    except QuatomError as error:
        yield frame(from_quatom(error).body())
    yield "data: [DONE]\n\n"


def frame(content: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Sends chunks as events. When the client vanishes the source is closed at once."""

    def __init__(
        self, chunks: Chunks, events: Callable[[Chunks], AsyncIterator[str]] = events
    ) -> None:
        """Send `chunks` as `events` frames them."""
        self._chunks = chunks
        super().__init__(
            events(chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def stream_response(self, send: Send) -> None:
        """Send everything; closing `chunks` aborts what still runs."""
        try:
            await super().stream_response(send)
        finally:
            await self._chunks.aclose()
