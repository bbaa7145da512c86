"""Worker: takes the server's commands in the engine's process, and reports what becomes of them."""

import logging
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import zmq

from quatom.engine.engine import Engine
from quatom.engine.outputs import SequenceDelta
from quatom.engine.requests import Request
from quatom.engine.structured.compiler import Compilation, CompiledConstraint
from quatom.errors import EngineError, QuatomError
from quatom.serving import messages
from quatom.serving.engine_loop import Abort, EngineLoop, Stop
from quatom.serving.engine_state import EngineStats, stats_of
from quatom.serving.messages import ENCODER, Failure, Report

logger = logging.getLogger("quatom.serving")

COMMANDS, REPORTS = "commands", "reports"
"""Names of the two sockets in the folder that both processes share."""
BEAT_SECONDS = 0.5
"""How often the engine says that it lives."""
LINGER_MS = 2000
"""How long the last report may take to leave."""


class Channel:
    """Reports to the server, from any thread."""

    def __init__(self, context: "zmq.Context[Any]", folder: Path) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # never waits: a request's length bounds its deltas
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(f"ipc://{folder / REPORTS}")
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        """Send one message."""
        content = ENCODER.encode(report)
        with self._lock:
            self._socket.send(content)

    def close(self) -> None:
        """Send what is left."""
        with self._lock:
            self._socket.close()


class Worker:
    """One engine, the requests prepared for it, and what is reported of it."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self.loop = EngineLoop(engine, self)
        self.failed_for_good = False
        self._engine = engine
        self._channel = channel
        self._compiling: dict[str, Compilation] = {}
        self._lock = threading.Lock()
        """Held while a request goes from one of the two dictionaries to the other."""
        self._prepared: dict[str, Request] = {}
        self._seen: deque[str] = deque()
        self._last_stats: EngineStats | None = None
        self._ended = threading.Event()

    def receive(self, context: "zmq.Context[Any]", folder: Path) -> None:
        """Take commands until told to quit; runs in a thread of its own."""
        socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(f"ipc://{folder / COMMANDS}")
        try:
            while True:
                match messages.COMMAND_DECODER.decode(socket.recv()):
                    case messages.Prepare() as command:
                        self._prepare(command)
                    case messages.Run(request_id):
                        self._run(request_id)
                    case messages.Drop(request_id):
                        self._drop(request_id)
                    case messages.Quit():
                        self.loop.commands.put(Stop())
                        return
        except zmq.ContextTerminated:
            return  # the engine has failed
        except Exception as error:  # without commands this process is of no use
            logger.exception("the engine process cannot read its commands")
            self.failed(f"{type(error).__name__}: {error}")
            self.loop.commands.put(Stop())
        finally:
            socket.close()

    def run(self) -> None:
        """Run the engine until told to quit, and say all along that it lives."""
        beat = threading.Thread(target=self._beat, name="quatom-beat", daemon=True)
        beat.start()
        self.loop.run()
        self._ended.set()
        beat.join()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if self.loop.shows_life():
                self._channel.send(messages.Alive())

    def _prepare(self, command: messages.Prepare) -> None:
        """Check a request; its constraint is compiled elsewhere, and holds up nobody else."""
        wanted = command.params.structured
        if wanted is None:
            self._make(command, None)
            return
        try:
            compilation = self._engine.requests.compile(wanted)
        except Exception as error:
            self._refuse(command.request_id, error)
            return
        self._compiling[command.request_id] = compilation
        compilation.future.add_done_callback(lambda done: self._compiled(command, done))

    def _compiled(self, command: messages.Prepare, done: "Future[CompiledConstraint]") -> None:
        """Go on with a request, in the thread that has compiled its constraint."""
        with self._lock:
            if self._compiling.pop(command.request_id, None) is None or done.cancelled():
                return  # dropped meanwhile
            error = done.exception()
            if error is None:
                self._make(command, done.result())
            else:
                self._refuse(command.request_id, error)

    def _make(self, command: messages.Prepare, constraint: CompiledConstraint | None) -> None:
        request_id = command.request_id
        try:
            request = self._engine.make_request(
                request_id, command.prompt_ids, command.params, constraint
            )
        except Exception as error:
            self._refuse(request_id, error)
            return
        self._prepared[request_id] = request
        self._channel.send(messages.Prepared(request_id, request.num_sequences))

    def _refuse(self, request_id: str, error: BaseException) -> None:
        if not isinstance(error, QuatomError):
            logger.error("a request could not be prepared", exc_info=error)
        self._channel.send(messages.Refused(request_id, Failure.of(error)))

    def _run(self, request_id: str) -> None:
        request = self._prepared.pop(request_id, None)
        if request is None:
            error = EngineError("the engine was started anew: send the request again")
            self.refused(request_id, error)
            return
        self.loop.commands.put(request)
        self._seen.append(request_id)  # after that, so that a count may be too high, never too low

    def _drop(self, request_id: str) -> None:
        with self._lock:
            compilation = self._compiling.pop(request_id, None)
            prepared = self._prepared.pop(request_id, None)
        if compilation is not None:
            compilation.cancel()
        elif prepared is None:
            self.loop.commands.put(Abort(request_id))

    # The engine's thread calls these.

    def stepped(self, deltas: list[SequenceDelta]) -> None:
        """Report a step."""
        self._last_stats = stats_of(self._engine)
        seen = [self._seen.popleft() for _ in range(len(self._seen))]
        queued = self.loop.commands.qsize()
        self._channel.send(messages.Step(deltas, self._last_stats, queued, seen))

    def idle(self) -> None:
        """Report the state if commands have changed it since the last step."""
        if self._seen or self._last_stats != stats_of(self._engine):
            self.stepped([])

    def refused(self, request_id: str, error: QuatomError) -> None:
        """Report that a request did not start."""
        self._channel.send(messages.Refused(request_id, Failure.of(error)))

    def failed(self, message: str) -> None:
        """Report the end."""
        self.failed_for_good = True
        self._channel.send(messages.Stopped(message))
