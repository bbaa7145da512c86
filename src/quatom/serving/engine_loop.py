"""EngineLoop: obey commands, run a step, report it, again. One thread runs it and owns the engine.

A step that raises ends the requests that were running, with the error. If it keeps happening, or
the device itself failed, the loop ends for good and says so.
"""

import logging
import queue
from dataclasses import dataclass
from typing import Protocol

from quatom.engine.engine import Engine
from quatom.engine.outputs import SequenceDelta
from quatom.engine.requests import Request
from quatom.errors import EngineError, QuatomError

logger = logging.getLogger("quatom.serving")

MAX_FAILED_STEPS = 3
"""Steps in a row that may raise before the engine stops."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request, whether it runs, waits or is not known."""

    request_id: str


class Stop:
    """End the loop. Requests that still run are dropped."""


class Listener(Protocol):
    """Who is told what the engine does, in the engine's thread."""

    def stepped(self, deltas: list[SequenceDelta]) -> None:
        """A step has run."""

    def idle(self) -> None:
        """There is nothing to do until the next command."""

    def refused(self, request_id: str, error: QuatomError) -> None:
        """A request could not be added."""

    def failed(self, message: str) -> None:
        """The engine has stopped for good."""


class EngineLoop:
    """The engine's side of every server. `commands` may be filled by any thread."""

    def __init__(self, engine: Engine, listener: Listener) -> None:
        """Run an engine that nothing else uses."""
        self.engine = engine
        self.commands: queue.SimpleQueue[Request | Abort | Stop] = queue.SimpleQueue()
        self._listener = listener
        self._failed_steps = 0
        self._steps = 0
        self._idle = False
        self._last_progress = -1

    def shows_life(self) -> bool:
        """Whether it has done anything since the last call, or has nothing to do.

        Blocks of a model count, so that a long step is no silence. One thread may ask.
        """
        progress = self._steps + self.engine.runner.model.blocks_run
        moved, self._last_progress = progress != self._last_progress, progress
        return moved or self._idle

    def run(self) -> None:
        """Until a Stop, or until the engine has failed for good."""
        try:
            self._run()
        except Exception as error:  # a fault of ours: whoever waits for the engine must know
            logger.exception("the engine's loop failed")
            self._listener.failed(f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        while self._obey():
            try:
                deltas = self.engine.step()
                self._failed_steps = 0
            except Exception as error:
                logger.exception("a step failed")
                self._failed_steps += 1
                message = f"{type(error).__name__}: {error}"
                fatal = self.engine.device.type == "cuda" or isinstance(error, EngineError)
                if fatal or self._failed_steps >= MAX_FAILED_STEPS:
                    self._listener.failed(message)
                    return
                deltas = self.engine.fail_running(message)
            self._steps += 1
            self._listener.stepped(deltas)

    def _obey(self) -> bool:
        """Carry out commands, waiting for one if there is nothing else to do. False: stop."""
        while True:
            try:
                command = self.commands.get_nowait()
            except queue.Empty:
                if self.engine.has_work:
                    return True
                self._listener.idle()
                self._idle = True
                command = self.commands.get()
                self._idle = False
            match command:
                case Stop():
                    return False
                case Abort(request_id):
                    self.engine.abort(request_id)
                case Request():
                    try:
                        self.engine.add(command)
                    except QuatomError as error:
                        self._listener.refused(command.request_id, error)
