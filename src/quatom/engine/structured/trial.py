"""A trial of a constraint, in a process that may be killed.

The process holds the tokenizer and forks for each constraint, under limits of CPU time and memory.
A constraint that would take seconds, all memory or the stack ends the fork and nothing else.

    stdin    {"tokenizer": "...", "vocab_size": n, "stop_token_ids": [...], "special_tokens": {}}
             {"kind": "regex", "value": "..."}, one line for each trial
             "cancel", which ends the trial under way
    stdout   one line for each trial: {"grammar": "...", "slow": false}, {"refused": "reason"}, or
             {"killed": signal, "seconds": CPU time}

This module does not import torch.
"""

import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import limits
from quatom.engine.structured.probe import Workbench, attempt

CANCEL = b"cancel"
NICENESS = 5
"""Of two that compete for a core, the engine gets three quarters of it."""


def serve() -> None:
    """Answer trials until stdin ends."""
    lines = _lines(0)
    setup = json.loads(next(lines))
    from llguidance import LLTokenizer

    stops = setup["stop_token_ids"]
    tokenizer = LLTokenizer(setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=stops)
    bench = Workbench(tokenizer, setup["special_tokens"], frozenset(stops))
    attempt(bench, StructuredOutput("json_object"))  # imports everything that the forks need
    for line in lines:
        if line != CANCEL:
            wanted = StructuredOutput(**json.loads(line))
            _write(_in_fork(partial(attempt, bench, wanted)) + b"\n")


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines as they come, without a buffer that `select` would not know of."""
    rest = b""
    while part := os.read(descriptor, 2**20):
        *whole, rest = (rest + part).split(b"\n")
        yield from whole


def _write(data: bytes, descriptor: int = 1) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _in_fork(work: Callable[[], dict[str, Any]]) -> bytes:
    """The JSON of what `work` returns, or of how it ended."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _limit()
        try:
            answer = work()
        except RecursionError:
            answer = {"refused": "it is nested too deeply to be compiled"}
        except BaseException as error:  # a panic of a Rust library is no Exception
            answer = {"refused": f"it cannot be compiled: {type(error).__name__}: {error}"[:300]}
        _write(json.dumps(answer).encode(), write_end)
        os._exit(0)
    os.close(write_end)
    parts = []
    while True:
        ready, _, _ = select.select([read_end, 0], [], [])
        if 0 in ready:  # "cancel", or the end of whoever asked
            os.kill(pid, signal.SIGKILL)
            if not os.read(0, 2**20):
                os._exit(0)
        part = os.read(read_end, 2**20) if read_end in ready else b""
        if read_end in ready and not part:
            break
        parts.append(part)
    os.close(read_end)
    _, status, usage = os.wait4(pid, 0)
    if status:
        seconds = usage.ru_utime + usage.ru_stime
        return json.dumps({"killed": status & 0x7F, "seconds": round(seconds, 2)}).encode()
    return b"".join(parts)


def _limit() -> None:
    seconds = limits.COMPILE_SECONDS
    signal.alarm(limits.WAIT_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + limits.COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
    os.nice(NICENESS)
    serve()
