"""One client process of a load: `python -m quatom.benchmark.load_client`, which `run_load` starts.

It must cost little beside the server that it measures. Requests are whole byte strings before the
clock starts, answers are read from bare sockets, and of an event only the token ids are counted.

Its input is a `Job` and then the time to start at; its output is an `Outcome`.
"""

import asyncio
import json
import os
import re
import ssl
import sys
import time
from array import array
from http import HTTPStatus

import msgspec

CONNECT_SECONDS = 30.0
_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})")
_CHUNKED = re.compile(rb"^transfer-encoding:\s*chunked\s*$", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)
_TOKEN_IDS = re.compile(rb'"token_ids":\s*\[([^\]]*)\]')
_CHOICES = re.compile(rb'"choices":\s*\[\s*\{')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class Job(msgspec.Struct):
    """What one process sends."""

    host: str
    port: int
    tls: bool
    requests: list[bytes]
    """Every request of the load as bytes for the socket; each asks to close the connection."""
    wanted: list[int]
    """Tokens that each must bring."""
    users: int = 0
    """Closed loop: so many users, who take the next request's number from `queue`."""
    queue: int = -1
    """File descriptor of a pipe of four-byte numbers that all processes read."""
    arrivals: dict[int, float] = {}
    """Open loop: request number to seconds after the start."""


class Answer(msgspec.Struct):
    """What came of one request. Times are seconds after the start."""

    number: int
    arrival: float
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    error: str | None = None
    intervals: bytes = b""
    """float64: seconds between a token and the next; tokens that came together are 0 apart."""


class Outcome(msgspec.Struct):
    """What came of a job."""

    answers: list[Answer]
    cpu_seconds: float
    """Of this process, from the start to the last byte."""


class AnswerReader(asyncio.Protocol):
    """Sends one request and counts the tokens of its answer. `done` ends with the connection."""

    def __init__(self, request: bytes, answer: Answer, start: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._answer = answer
        self._start = start
        self._status = 0
        self._chunked = False
        self._left: int | None = None  # bytes of the body still to come, if its length was told
        self._raw = b""  # not yet a whole head or chunk
        self._text = b""  # not yet a whole line; all of the body of an error
        self._intervals = array("d")
        self._reported: int | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count what has come."""
        now = time.perf_counter() - self._start
        if not self._status:
            head, found, data = (self._raw + data).partition(b"\r\n\r\n")
            if not found:
                self._raw = head
                return
            self._raw = b""
            self._read_head(head)
        body = self._unchunk(data) if self._chunked else data
        if self._status != HTTPStatus.OK:
            self._text += body
        elif body:
            self._read_lines(body, now)
        if self._left is not None:
            self._left -= len(body)
            if self._left <= 0:
                self._close()

    def connection_lost(self, error: Exception | None) -> None:
        """Settle the answer."""
        answer = self._answer
        if error is not None:
            answer.error = f"{type(error).__name__}: {error}"
        elif not self._status:
            answer.error = "the server closed the connection without an answer"
        elif self._status != HTTPStatus.OK:
            text = self._text.decode(errors="replace")
            answer.error = f"HTTP {self._status}: {text[:200]}"
        if self._reported is not None:
            answer.tokens = self._reported
        answer.intervals = self._intervals.tobytes()
        if not self.done.done():
            self.done.set_result(None)

    def _read_head(self, head: bytes) -> None:
        status = _HEAD.match(head)
        self._status = int(status[1]) if status else HTTPStatus.BAD_GATEWAY
        lines = head.replace(b"\r\n", b"\n")
        self._chunked = _CHUNKED.search(lines) is not None
        if length := _LENGTH.search(lines):
            self._left = int(length[1])

    def _close(self) -> None:
        """The answer is whole; a server may keep the connection open all the same."""
        assert self._transport is not None
        self._transport.close()

    def _unchunk(self, data: bytes) -> bytes:
        """The whole chunks that are there."""
        data, parts, at = self._raw + data, [], 0
        while (end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:end].partition(b";")[0] or b"0", 16)
            begin = end + 2
            if not size:
                self._close()
                break
            if len(data) < begin + size + 2:
                break
            parts.append(data[begin : begin + size])
            at = begin + size + 2
        self._raw = data[at:]
        return b"".join(parts)

    def _read_lines(self, body: bytes, now: float) -> None:
        """Count the tokens of whole lines: all of them came now."""
        lines, newline, self._text = (self._text + body).rpartition(b"\n")
        if not newline:
            return
        if b'data: {"error"' in lines:
            line = lines[lines.index(b'data: {"error"') + 6 :].split(b"\n")[0]
            self._answer.error = str(json.loads(line)["error"])
            return
        if b'"completion_tokens"' in lines:
            self._reported = int(_COMPLETION_TOKENS.findall(lines)[-1])
        told = _TOKEN_IDS.findall(lines)
        # A server that does not tell token ids sends each token as an event of its own.
        count = sum(ids.count(b",") + 1 for ids in told if ids.strip())
        if not told:
            count = len(_CHOICES.findall(lines))
        if count:
            self._add(count, now)

    def _add(self, count: int, now: float) -> None:
        answer = self._answer
        if answer.last_token is None:
            answer.first_token = now
        else:
            self._intervals.append(now - answer.last_token)
        self._intervals.extend([0.0] * (count - 1))
        answer.last_token = now
        answer.tokens += count


class Client:
    """Carries out a job."""

    def __init__(self, job: Job, start: float) -> None:
        self._job = job
        self._start = start
        self._tls = ssl.create_default_context() if job.tls else None
        self.answers: list[Answer] = []

    async def run(self) -> None:
        """Send everything and wait for the last answer."""
        await self._sleep_until(0.0)
        users = [self._user() for _ in range(self._job.users)]
        visitors = [self._visitor(i, at) for i, at in self._job.arrivals.items()]
        await asyncio.gather(*users, *visitors)

    async def _user(self) -> None:
        while number := os.read(self._job.queue, 4):
            await self._ask(int.from_bytes(number), time.perf_counter() - self._start)

    async def _visitor(self, number: int, arrival: float) -> None:
        await self._sleep_until(arrival)
        await self._ask(number, arrival)

    async def _sleep_until(self, seconds: float) -> None:
        await asyncio.sleep(self._start + seconds - time.perf_counter())

    async def _ask(self, number: int, arrival: float) -> None:
        job, answer = self._job, Answer(number, arrival)
        self.answers.append(answer)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, reader = await asyncio.get_running_loop().create_connection(
                    lambda: AnswerReader(job.requests[number], answer, self._start),
                    job.host,
                    job.port,
                    ssl=self._tls,
                )
            await reader.done
        except (OSError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        if answer.error is None and answer.tokens != job.wanted[number]:
            answer.error = f"ended after {answer.tokens} of {job.wanted[number]} tokens"


def main() -> None:
    """Read a job, say that it is read, start when told to, and write what came of it."""
    size = int.from_bytes(sys.stdin.buffer.read(8))
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=Job)
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    client = Client(job, float(sys.stdin.buffer.readline()))
    cpu = time.process_time()
    asyncio.run(client.run())
    outcome = Outcome(client.answers, time.process_time() - cpu)
    sys.stdout.buffer.write(msgspec.msgpack.encode(outcome))


if __name__ == "__main__":
    main()
