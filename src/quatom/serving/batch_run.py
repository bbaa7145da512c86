"""Answer a batch through the application in this process, as over HTTP.

Each answer is appended to the output when it is there, in any order; a batch that is run again
leaves out what is answered.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from quatom.errors import EngineError
from quatom.serving.api_errors import ApiError
from quatom.serving.batch_file import BadLine, BatchLine, make_answer
from quatom.serving.batch_output import open_output

logger = logging.getLogger("quatom.serving")


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What became of a batch."""

    completed: int
    failed: int
    """Answered with an error, bad lines among them."""
    skipped: int
    """Answered by an earlier run."""


async def run_batch(
    app: FastAPI | None,
    lines: Sequence[BatchLine | BadLine],
    output: Path,
    *,
    concurrency: int,
    on_answer: Callable[[bool], None] = lambda succeeded: None,
) -> BatchCounts:
    """Answer every line that `output` does not answer yet.

    Args:
        app: made by `create_app`; its lifespan runs meanwhile. None: no request waits.
        lines: what `read_batch` read.
        output: file that answers are appended to; see `open_output`.
        concurrency: requests in the engine at once.
        on_answer: told of each answer, and whether it is no error.

    Raises:
        EngineError: the engine stopped for good. What is not answered then is left to another run.
        RequestError: `output` cannot take the answers.
    """
    counts = {True: 0, False: 0}

    def add(answer: dict[str, Any]) -> None:
        file.add(answer)
        succeeded = answer["response"]["status_code"] < HTTPStatus.BAD_REQUEST
        counts[succeeded] += 1
        on_answer(succeeded)

    with open_output(output, lines) as (found, file):
        for bad in found.unnoted:
            add(bad.answer())
        if found.waiting:
            assert app is not None
            await _answer_all(app, found.waiting, add, concurrency)
        file.sync()
    skipped = len(lines) - len(found.waiting) - len(found.unnoted)
    return BatchCounts(counts[True], counts[False], skipped)


async def _answer_all(
    app: FastAPI,
    waiting: Sequence[BatchLine],
    add: Callable[[dict[str, Any]], None],
    concurrency: int,
) -> None:
    engine = app.state.async_engine
    rest = iter(waiting)

    async def work() -> None:
        for line in rest:
            status, body = await call(app, line.url, line.body)
            if engine.error is not None:
                raise EngineError(f"{engine.error}; run the batch again")
            add(make_answer(line.custom_id, status, body))

    async with app.router.lifespan_context(app):
        workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(waiting)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def call(app: FastAPI, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POST to the application in this process: (status, parsed body); 500 if it raises."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    incoming: asyncio.Queue[Message] = asyncio.Queue()  # then silence: this client never leaves
    status, parts = 0, []

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    try:
        content = json.dumps(body).encode()
        incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        await app(scope, incoming.get, send)
    except Exception:  # it is this request's alone, and the application has answered it with 500
        logger.exception("a request of the batch failed")
    try:
        return status, json.loads(b"".join(parts))
    except ValueError:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        message = "there was no answer; the log has the details"
        return status, ApiError(status, message, kind="server_error", code="internal_error").body()
