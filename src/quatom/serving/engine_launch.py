"""EnginePlan: what the engine's process builds. EngineProcess: that process, from outside."""

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zmq

from quatom.engine.child_process import start_module
from quatom.errors import EngineError
from quatom.serving.engine_state import EngineFacts
from quatom.serving.engine_worker import COMMANDS, REPORTS
from quatom.serving.messages import ENCODER, REPORT_DECODER, Command, NotStarted, Ready, Report

POLL_MS = 100
CONNECT_MS = 10_000
QUIT_SECONDS = 10.0
"""How long the engine's process may take to end after it was told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What the engine's process is to build; all of it can be written as JSON."""

    factory: str
    """"module:function" that returns an Engine."""
    arguments: dict[str, Any] = field(default_factory=dict)
    log_level: str = "INFO"


class EngineProcess:
    """An engine's process and the sockets to it."""

    facts: EngineFacts

    def __init__(self, plan: EnginePlan) -> None:
        """Start the process; `wait_until_ready` comes next.

        Call it in a thread that lives as long as the process shall: Linux ends the process with it.

        Raises:
            EngineError: the sockets cannot be made, or the system starts no process.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="quatom-"))  # only this user may enter it
        except OSError as error:
            raise EngineError(
                f"cannot make a folder for the engine's sockets: {error}; set TMPDIR to a folder "
                "that can be written"
            ) from error
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self.reports = self._context.socket(zmq.PULL)
        try:
            for socket, name in ((self._commands, COMMANDS), (self.reports, REPORTS)):
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.RCVHWM, 0)
                socket.bind(f"ipc://{self._folder / name}")
        except zmq.ZMQError as error:
            self._close_sockets()
            raise EngineError(
                f"cannot make a socket in {self._folder}: {error}; set TMPDIR to a folder with a "
                "short path"
            ) from error
        try:
            self.popen = start_module(
                "quatom.serving.engine_process",
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the server, which ends this process itself
            )
        except OSError as error:
            self._close_sockets()
            raise EngineError(f"cannot start the engine's process: {error}") from error
        assert self.popen.stdin is not None
        line = json.dumps({**asdict(plan), "folder": str(self._folder)}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has ended, which will be noticed
            self.popen.stdin.write(line.encode())
            self.popen.stdin.flush()

    @property
    def ending(self) -> str:
        """How the process ended, for people."""
        status = self.popen.returncode
        if status is None or status >= 0:
            return f"the engine's process ended with status {status}"
        names = {int(s): s.name for s in signal.Signals}  # real-time signals have none
        return f"the engine's process was killed by {names.get(-status, f'signal {-status}')}"

    def wait_until_ready(self) -> None:
        """Wait until the engine takes requests. Any error or interruption ends the process.

        Raises:
            QuatomError: what the engine's process could not do, as if it had been done here.
        """
        try:
            match self._first_report():
                case Ready(facts):
                    self.facts = facts
                    if not self._commands.poll(CONNECT_MS, zmq.POLLOUT):
                        raise EngineError("the engine's process does not take commands")
                case NotStarted(failure):
                    raise failure.error()
                case report:
                    raise EngineError(f"the engine's process began with {report!r:.200}")
        except BaseException:
            self.close(0.0)
            raise
        shutil.rmtree(self._folder, ignore_errors=True)  # connected sockets need no names

    def send(self, command: Command) -> None:
        """Send a command; never waits. If nobody is left to read it, it is lost."""
        if not self._commands.closed:
            with contextlib.suppress(zmq.Again):
                self._commands.send(ENCODER.encode(command), zmq.NOBLOCK)

    def receive(self) -> Report | None:
        """The next report; None if there is none."""
        if self.reports.closed:
            return None
        try:
            content = self.reports.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return REPORT_DECODER.decode(content)

    def close(self, seconds: float = QUIT_SECONDS) -> None:
        """Wait for the process to end, kill it if it does not, and close the sockets."""
        try:
            self.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self._close_sockets()

    def _first_report(self) -> Report:
        while not self.reports.poll(POLL_MS):
            if self.popen.poll() is not None and not self.reports.poll(POLL_MS):
                raise EngineError(
                    f"{self.ending} while it started; its own messages are above"
                    + "; killed without one, it most likely had too little memory"
                    * (self.popen.returncode == -signal.SIGKILL)
                )
        return REPORT_DECODER.decode(self.reports.recv())

    def _close_sockets(self) -> None:
        self._commands.close()
        self.reports.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
