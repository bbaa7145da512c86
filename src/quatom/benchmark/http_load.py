"""Load on an OpenAI-compatible server over HTTP: streamed completions, timed token by token.

It knows nothing of the server's process: any server that streams /v1/completions can be measured,
and one that counts under vLLM's metric names shows its batch too. Requests are sent by several
processes, so that the client is not what is measured.
"""

import json
import os
import subprocess
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Thread
from urllib.parse import urlsplit

import httpx
import msgspec

from quatom.benchmark.latency import RequestTimes, Timeline
from quatom.benchmark.load_client import Job, Outcome
from quatom.benchmark.server_metrics import POLL_SECONDS, Poll, read_metrics
from quatom.engine.child_process import start_module
from quatom.errors import EngineError

MAX_PROCESSES = 8
START_SECONDS = 0.1
"""From the moment that every process is ready to the start."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the model that it is asked for."""

    url: str
    model: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class LoadRun:
    """What happened to a series of requests."""

    requests: list[RequestTimes]
    intervals: list[float] = field(default_factory=list)
    """Seconds between a token and the next; tokens that came together are 0 apart."""
    timeline: Timeline = field(default_factory=Timeline)
    seconds: float = 0.0
    """From the first request to the last token."""
    kv_tokens: int | None = None
    preemptions: int | None = None
    processes: int = 0
    """Processes that sent the requests."""
    cpu_seconds: float = 0.0
    """CPU time of all of them together."""

    @property
    def errors(self) -> list[str]:
        """What failed requests were told."""
        return [r.error for r in self.requests if r.error is not None]


def run_load(
    target: Target,
    prompts: Sequence[list[int]],
    output_tokens: Sequence[int],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] | None = None,
    processes: int | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> LoadRun:
    """Send every request and wait for the last token.

    Args:
        target: the server.
        prompts: token ids of each request.
        output_tokens: tokens to generate for each.
        concurrency: closed loop: so many users, each of whom sends a request when the last one is
            answered.
        arrivals: open loop: seconds after the start at which each request is sent, whatever has
            become of the others. A request's clock starts then, even if the client is late.
        processes: that send the requests; None: half of the machine's cores, at most 8.
        poll_seconds: how often the server's metrics are read.

    Raises:
        EngineError: a client process failed.
    """
    run = LoadRun([RequestTimes(arrival=0.0, input_tokens=len(prompt)) for prompt in prompts])
    users = 0 if arrivals is not None else min(concurrency or 1, len(prompts))
    run.processes = _count_processes(processes, users or len(prompts))
    url = urlsplit(target.url)
    requests = [
        _request(target, prompt, n) for prompt, n in zip(prompts, output_tokens, strict=True)
    ]
    with (
        httpx.Client(base_url=target.url, headers=target.headers) as client,
        _numbers(len(prompts) if users else 0) as queue,
    ):
        before = read_metrics(client)
        jobs = [
            Job(
                host=url.hostname or "",
                port=url.port or (443 if url.scheme == "https" else 80),
                tls=url.scheme == "https",
                requests=requests,
                wanted=list(output_tokens),
                users=len(range(i, users, run.processes)),
                queue=queue,
                arrivals=dict(list(enumerate(arrivals or ()))[i :: run.processes]),
            )
            for i in range(run.processes)
        ]
        for outcome in _carry_out(jobs, client, run.timeline, poll_seconds):
            _add(run, outcome)
        after = read_metrics(client)
    run.seconds = max((r.last_token or r.arrival for r in run.requests), default=0.0)
    run.kv_tokens = after.get("kv_tokens")
    if "num_preemptions_total" in after:
        counted = after["num_preemptions_total"] - before.get("num_preemptions_total", 0)
        run.preemptions = int(counted)
    return run


def _count_processes(wanted: int | None, useful: int) -> int:
    half = max(1, (os.cpu_count() or 1) // 2)
    return min(wanted or min(half, MAX_PROCESSES), useful)


def _request(target: Target, prompt: list[int], count: int) -> bytes:
    """A streamed completion as it goes through the socket."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    data = json.dumps(body).encode()
    url = urlsplit(target.url)
    headers = {
        "Host": url.netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
        **target.headers,
    }
    lines = [f"POST {url.path}/v1/completions HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


@contextmanager
def _numbers(count: int) -> Iterator[int]:
    """A pipe that holds 0 to count - 1, four bytes each, for whoever reads next."""
    reading, writing = os.pipe()

    def write() -> None:  # blocks while the pipe is full
        with suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
            for number in range(count):
                file.write(number.to_bytes(4))

    thread = Thread(target=write, daemon=True)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)


def _carry_out(
    jobs: Sequence[Job], client: httpx.Client, timeline: Timeline, poll_seconds: float
) -> list[Outcome]:
    """Run each job in a process of its own; all of them start at one time."""
    processes = [
        start_module(
            "quatom.benchmark.load_client",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(job.queue,),
        )
        for job in jobs
    ]
    try:
        for process, job in zip(processes, jobs, strict=True):
            content = msgspec.msgpack.encode(job)
            _write(process, len(content).to_bytes(8) + content)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        start = time.perf_counter() + START_SECONDS
        for process in processes:
            _write(process, f"{start}\n".encode())
        with Poll(client, timeline, start, poll_seconds):
            return [_outcome(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _write(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(content)
        process.stdin.flush()
    except BrokenPipeError as error:
        raise EngineError("a client process ended; its own message is above") from error


def _outcome(process: "subprocess.Popen[bytes]") -> Outcome:
    assert process.stdout is not None
    content = process.stdout.read()
    if process.wait() != 0:
        raise EngineError(
            f"a client process ended with status {process.returncode}; its own message is above"
        )
    return msgspec.msgpack.decode(content, type=Outcome)


def _add(run: LoadRun, outcome: Outcome) -> None:
    run.cpu_seconds += outcome.cpu_seconds
    for answer in outcome.answers:
        times = run.requests[answer.number]
        times.arrival = answer.arrival
        times.first_token, times.last_token = answer.first_token, answer.last_token
        times.output_tokens, times.error = answer.tokens, answer.error
        run.intervals.extend(array("d", answer.intervals))
