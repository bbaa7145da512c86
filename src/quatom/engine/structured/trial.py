"""A trial of a constraint, in a process that may be killed: `python -m quatom.engine.structured.trial`.

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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import limits
from quatom.engine.structured.blame import explain
from quatom.engine.structured.grammar import compile_constraint
from quatom.errors import RequestError

CANCEL = b"cancel"
NICENESS = 5
"""Of two that want a core, the engine gets three quarters of it."""


@dataclass(frozen=True, slots=True)
class Workbench:
    """What trials need: a tokenizer of llguidance, special tokens by name, and those that end."""

    tokenizer: Any
    special_tokens: dict[str, int]
    stop_token_ids: frozenset[int]


def attempt(bench: Workbench, wanted: StructuredOutput) -> dict[str, Any]:
    """Check, translate and compile a constraint, and measure some masks."""
    from llguidance import LLMatcher

    parser_limits = limits.parser_limits()

    def complaint(grammar: str) -> str:
        return LLMatcher.validate_grammar(grammar, None, limits=parser_limits)

    def refuse(reason: str = "") -> dict[str, Any]:
        text = explain(constraint, reason, complaint) or "it allows no text at all"
        return {"refused": f"invalid {wanted.kind}: {text}"}

    try:
        constraint = compile_constraint(wanted, bench.special_tokens)
    except RequestError as error:
        return {"refused": str(error)}
    grammar = constraint.text()
    matcher = LLMatcher(bench.tokenizer, grammar, log_level=0, limits=parser_limits)
    if matcher.is_error():
        return refuse(matcher.get_error())
    first = _token_ids(matcher.compute_bitmask())
    if not first or matcher.is_error():
        return refuse()
    if bench.stop_token_ids.issuperset(first):
        return {"refused": f"invalid {wanted.kind}: it allows the empty text alone"}
    seconds = []
    for choose in (_any_token, _short_token):
        walked, error = _walk(bench, matcher.deep_copy(), choose)
        seconds += walked
        if error or max(walked) > limits.MASK_SECONDS:
            return {"refused": _too_costly(wanted, len(walked), max(walked), error)}
    slow = max(median(seconds), max(seconds) / 10) > limits.SLOW_MASK_SECONDS
    return {"grammar": grammar, "slow": slow}


def _too_costly(wanted: StructuredOutput, steps: int, seconds: float, error: str) -> str:
    found = error or f"a mask took {seconds * 1e3:.0f} ms"
    return (
        f"the {wanted.kind} is too costly to enforce: {found} after {steps} tokens; the budget is "
        f"{limits.MASK_SECONDS * 1e3:.0f} ms of CPU time for each token: use fewer alternatives, "
        "shorter literals and smaller repetitions"
    )


Choose = Callable[[Workbench, list[int], int], int]


def _walk(bench: Workbench, matcher: Any, choose: Choose) -> tuple[list[float], str]:
    """CPU time of each mask of a text of up to TRIAL_STEPS tokens, and what went wrong."""
    seconds = []
    for step in range(limits.TRIAL_STEPS):
        started = time.thread_time()
        bits = matcher.compute_bitmask()
        seconds.append(time.thread_time() - started)
        if matcher.is_error():
            return seconds, first_line(matcher.get_error())
        allowed = _token_ids(bits)
        if not allowed:
            return seconds, "this model has no token with which the text can go on"
        matcher.consume_token(choose(bench, allowed, step))
        if matcher.is_error():
            return seconds, first_line(matcher.get_error())
        if matcher.is_stopped():
            break
    return seconds, ""


def first_line(error: str) -> str:
    """The first line of an error of llguidance, which may go on with its whole state."""
    return error.strip().partition("\n")[0][:300]


def _token_ids(bits: bytes) -> list[int]:
    return [
        8 * i + bit for i, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
    ]


def _any_token(bench: Workbench, allowed: list[int], step: int) -> int:
    return allowed[step * 7919 % len(allowed)]


def _short_token(bench: Workbench, allowed: list[int], step: int) -> int:
    some = allowed[:: max(1, len(allowed) // 16)]
    return min(some, key=lambda token: len(bench.tokenizer.decode_bytes([token])))


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
            answer = _in_fork(lambda wanted=wanted: attempt(bench, wanted))
            _write(answer + b"\n")


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
