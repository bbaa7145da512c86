"""What a file of answers holds: which of them are kept, and which a run makes again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

from quatom.errors import RequestError
from quatom.serving.batch_file import (
    ANSWER_START,
    BadLine,
    BatchLine,
    bad_lines_of,
    requests_of,
)

_FIELDS = {"id", "custom_id", "response", "error"}
_TRIED_AGAIN = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}
"""Statuses below 500 that say nothing about the request itself, as OpenAI's client sees it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What an output file holds, and what it lacks."""

    kept: bytes
    """Its content without what is unfinished or to be made again."""
    outdated: bool
    """Whether that leaves out a whole line, or at most the unfinished end."""
    waiting: list[BatchLine]
    """Requests without an answer that is kept."""
    unnoted: list[BadLine]
    """Bad lines whose error is not in the file."""


def read_output(content: bytes, name: object, lines: Sequence[BatchLine | BadLine]) -> Output:
    """Compare answers with the batch that they are for.

    Args:
        content: of the output file.
        name: of the file, for messages.
        lines: the batch.

    Raises:
        RequestError: the file holds anything but answers.
    """
    texts = content.split(b"\n")
    end = texts.pop()
    answers = [_parse(text) for text in texts]
    if end and (last := _parse(end)) is not None:
        texts.append(end)  # only the line's end is missing
        answers.append(last)
    elif not end.startswith(ANSWER_START) and not ANSWER_START.startswith(end):
        answers.append(None)
    if None in answers:
        raise RequestError(
            f"{name}, line {answers.index(None) + 1} is no answer of a batch: give another output "
            "file; this one was not changed"
        )
    sort = _Sorter(lines)
    keep = [answer is not None and sort.keeps(answer) for answer in answers]
    return Output(
        kept=b"".join(text + b"\n" for text, kept in zip(texts, keep, strict=True) if kept),
        outdated=not all(keep),
        waiting=[line for line in requests_of(lines) if line.custom_id not in sort.answered],
        unnoted=[line for line in bad_lines_of(lines) if line.number not in sort.noted],
    )


class _Answer(NamedTuple):
    """What matters of one line."""

    custom_id: str | None = None
    status: int | None = None
    error: dict[str, Any] | None = None


_BLANK = _Answer()


class _Sorter:
    """Tells answers that are kept from those that a run makes again."""

    def __init__(self, lines: Sequence[BatchLine | BadLine]) -> None:
        self._numbers = {line.number for line in lines}
        self._requests = {line.custom_id for line in requests_of(lines)}
        self._bad = {line.number: line for line in bad_lines_of(lines)}
        self.answered: set[str] = set()
        self.noted: set[int] = set()

    def keeps(self, answer: _Answer) -> bool:
        number = None if answer.error is None else answer.error.get("line")
        if isinstance(number, int):  # the answer to a bad line
            bad = self._bad.get(number)
            if bad is None or (bad.custom_id, bad.error()) != (answer.custom_id, answer.error):
                return number not in self._numbers  # that line was changed, or is of another batch
            self.noted.add(number)
            return True
        if answer.custom_id is None or answer.custom_id not in self._requests:
            return True
        if not _stands(answer.status):
            return False
        self.answered.add(answer.custom_id)
        return True


def _stands(status: int | None) -> bool:
    failed = status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return not failed and status not in _TRIED_AGAIN


def _parse(text: bytes) -> _Answer | None:
    """A line of the file; None: it is no answer."""
    if not text.strip():
        return _BLANK
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not answer.keys() >= _FIELDS:
        return None
    custom_id, response, error = answer["custom_id"], answer["response"], answer["error"]
    status = response.get("status_code") if isinstance(response, dict) else None
    sound = (
        isinstance(custom_id, str | None)
        and isinstance(error, dict | None)
        and (response is None or isinstance(status, int))
    )
    return _Answer(custom_id, status, error) if sound else None
