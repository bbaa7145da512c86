"""The parent's side of `trial`: one process for each thread that compiles constraints."""

import json
import signal
import subprocess
import threading
import weakref
from typing import Any

from quatom.engine.child_process import start_module
from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import limits
from quatom.errors import EngineError, RequestError

ENDINGS = {
    signal.SIGXCPU: "it took all of the {budget} s of CPU time that a constraint has: make it "
    "smaller, with fewer alternatives and repetitions",
    signal.SIGALRM: "it did not get its {budget} s of CPU time within {wait} s: try again later",
    signal.SIGKILL: "the request was cancelled",
    signal.SIGABRT: "it needs more than {megabytes} MiB of memory: make it smaller",
    signal.SIGSEGV: "it is nested too deeply: make its chain of references shorter",
}


class Trials:
    """A process that tries constraints, one after another. It starts with the first one."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """`setup` is the first line that the process reads."""
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._job: object = None

    def run(self, wanted: StructuredOutput, job: object = None) -> dict[str, Any]:
        """The grammar of a constraint, and whether its masks are slow.

        Args:
            wanted: the constraint.
            job: what `cancel` calls this trial.

        Raises:
            RequestError: it is invalid, cannot be enforced, or is over the budget.
            EngineError: the process cannot be started, or has ended.
        """
        line = json.dumps({"kind": wanted.kind, "value": wanted.value}).encode()
        try:
            with self._lock:
                process, self._job = self._start(), job
                self._send(process, line)
            answer = _answer(process)
        except OSError as error:
            raise EngineError(f"the process that checks constraints is gone: {error}") from error
        finally:
            with self._lock:
                self._job = None
        if "refused" in answer:
            raise RequestError(answer["refused"])
        if "killed" in answer:
            reason = ENDINGS.get(answer["killed"], f"it ended with signal {answer['killed']}")
            reason = reason.format(
                budget=limits.COMPILE_SECONDS,
                wait=limits.WAIT_SECONDS,
                megabytes=limits.COMPILE_BYTES // 2**20,
            )
            raise RequestError(
                f"invalid {wanted.kind}: {reason} (after {answer['seconds']} s of CPU time)"
            )
        return answer

    def cancel(self, job: object) -> None:
        """End the trial under way if it is this one; `run` raises.

        Waits while the process starts: nothing for an event loop.
        """
        with self._lock:
            if self._job is job and self._process is not None:
                self._send(self._process, b"cancel")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = start_module(
            "quatom.engine.structured.trial",
            flags=("-W", "ignore"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which ends this process itself
        )
        weakref.finalize(self, self._process.kill)  # it would end by itself, but later
        self._send(self._process, json.dumps(self._setup).encode())
        return self._process

    def _send(self, process: "subprocess.Popen[bytes]", line: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()


def _answer(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        raise EngineError(f"the process that checks constraints ended with code {process.wait()}")
    return json.loads(answer)
