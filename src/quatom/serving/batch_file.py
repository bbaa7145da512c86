"""Offline batches in OpenAI's form: a JSONL of requests in, a JSONL of responses out.

A line in:  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
A line out: {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200,
             "request_id": "...", "body": {...}}, "error": null}

Requests go through the same application as over HTTP, so both give the same answers. Each answer is
appended when it is there, in any order; a batch that is run again leaves out what is answered.
"""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from quatom.errors import RequestError

URLS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What became of a batch."""

    completed: int
    failed: int
    skipped: int
    """Answered by an earlier run."""


def read_batch(path: Path) -> list[BatchLine]:
    """All requests of a batch file.

    Raises:
        RequestError: a line is no request, or a custom_id occurs twice; with the line's number.
    """
    lines: list[BatchLine] = []
    seen: set[str] = set()
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        line = _read_line(text, f"{path}, line {number}")
        if line.custom_id in seen:
            raise RequestError(f"{path}, line {number}: custom_id {line.custom_id!r} occurs twice")
        seen.add(line.custom_id)
        lines.append(line)
    return lines


def _read_line(text: bytes, where: str) -> BatchLine:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("custom_id"), str):
        raise RequestError(f"{where}: a request is an object with a string custom_id")
    if data.get("method", "POST") != "POST" or data.get("url") not in URLS:
        raise RequestError(f"{where}: method must be POST and url one of {', '.join(URLS)}")
    if not isinstance(data.get("body"), dict) or data["body"].get("stream"):
        raise RequestError(f"{where}: body must be an object, and not ask for a stream")
    return BatchLine(data["custom_id"], data["url"], data["body"])


def answered_ids(path: Path) -> set[str]:
    """custom_ids that an earlier run answered. A last line that it could not finish is cut off."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return set(_custom_ids(whole, path))


def _custom_ids(content: bytes, path: Path) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield str(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{path}, line {number} is no answer of a batch: give another output file"
            ) from error


async def run_batch(
    app: FastAPI,
    lines: list[BatchLine],
    output: Path,
    *,
    concurrency: int,
    on_answer: Callable[[bool], None] = lambda succeeded: None,
) -> BatchCounts:
    """Answer every line that `output` does not answer yet.

    Args:
        app: made by `create_app`; its lifespan runs meanwhile.
        lines: the requests.
        output: file that answers are appended to.
        concurrency: requests in the engine at once.
        on_answer: told of each answer, and whether it is no error.
    """
    done = answered_ids(output)
    waiting = [line for line in lines if line.custom_id not in done]
    counts = {True: 0, False: 0}
    slots = asyncio.Semaphore(concurrency)

    with output.open("ab") as file:

        async def one(line: BatchLine) -> None:
            async with slots:
                status, body = await call(app, line.url, json.dumps(line.body).encode())
            answer = _answer(line.custom_id, status, body)
            file.write(json.dumps(answer).encode() + b"\n")
            file.flush()
            counts[status < HTTPStatus.BAD_REQUEST] += 1
            on_answer(status < HTTPStatus.BAD_REQUEST)

        async with _lifespan(app):
            await asyncio.gather(*(one(line) for line in waiting))
        os.fsync(file.fileno())
    return BatchCounts(counts[True], counts[False], len(lines) - len(waiting))


def _answer(custom_id: str, status: int, body: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": None,
    }


async def call(app: FastAPI, path: str, body: bytes) -> tuple[int, Any]:
    """POST to the application in this process: (status, parsed body)."""
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
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    status, parts = 0, []

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, incoming.get, send)
    return status, json.loads(b"".join(parts))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with app.router.lifespan_context(app):
        yield
