"""Batches in OpenAI's form: lines of requests in, lines of answers out.

A line in:  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
A line out: {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200,
             "request_id": "...", "body": {...}}, "error": null}

A line in that is no request gets an answer too, with an error that says what is wrong with it.
"""

import codecs
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from quatom.serving.api_errors import ApiError

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")
ANSWER_START = b'{"id": "batch_req_'
"""How every line out begins."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch."""

    number: int
    """Of the line in its file, from 1."""
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request."""

    number: int
    custom_id: str | None
    """None where the line has none."""
    code: str
    message: str

    def error(self) -> dict[str, Any]:
        """The error object, as OpenAI describes a batch's wrong lines."""
        return {"code": self.code, "message": self.message, "param": None, "line": self.number}

    def answer(self) -> dict[str, Any]:
        """The whole line out."""
        refusal = ApiError(HTTPStatus.BAD_REQUEST, self.message, code=self.code)
        return make_answer(self.custom_id, refusal.status, refusal.body(), self.error())


def make_answer(
    custom_id: str | None, status: int, body: Any, error: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line out, as an object."""
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": error,
    }


def read_batch(path: Path) -> list[BatchLine | BadLine]:
    """All lines of a batch file that are not blank. Of requests with one custom_id, one is good.

    Raises:
        OSError: it cannot be read.
    """
    lines: list[BatchLine | BadLine] = []
    seen: set[str] = set()
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, text in enumerate(content.splitlines(), start=1):
        if not text.strip():
            continue
        line = _read_line(number, text)
        if isinstance(line, BatchLine):
            if line.custom_id in seen:
                problem = f"custom_id {line.custom_id!r} occurs twice; the first one is answered"
                line = _bad(number, line.custom_id, "duplicate_custom_id", problem)
            else:
                seen.add(line.custom_id)
        lines.append(line)
    return lines


def requests_of(lines: Sequence[BatchLine | BadLine]) -> list[BatchLine]:
    """The lines that are requests."""
    return [line for line in lines if isinstance(line, BatchLine)]


def bad_lines_of(lines: Sequence[BatchLine | BadLine]) -> list[BadLine]:
    """The lines that are none."""
    return [line for line in lines if isinstance(line, BadLine)]


def _read_line(number: int, text: bytes) -> BatchLine | BadLine:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _bad(number, None, "invalid_json_line", f"not JSON: {error}")
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    if not isinstance(custom_id, str):
        problem = "a request is an object with a string custom_id"
        return _bad(number, None, "missing_custom_id", problem)
    method, url, body = data.get("method", "POST"), data.get("url"), data.get("body")
    if method != "POST":
        return _bad(number, custom_id, "invalid_method", f"method must be POST, got {method!r:.80}")
    if url not in URLS:
        problem = f"url must be one of {', '.join(URLS)}, got {url!r:.80}"
        return _bad(number, custom_id, "invalid_url", problem)
    if not isinstance(body, dict) or body.get("stream"):
        problem = "body must be an object, and not ask for a stream"
        return _bad(number, custom_id, "invalid_body", problem)
    return BatchLine(number, custom_id, url, body)


def _bad(number: int, custom_id: str | None, code: str, problem: str) -> BadLine:
    return BadLine(number, custom_id, code, f"line {number}: {problem}")
