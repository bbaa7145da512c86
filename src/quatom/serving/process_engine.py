"""ProcessEngine: the engine in a process of its own, which HTTP, JSON and events do not hold up.

Whatever ends that process, every open request gets an error at once. Then the server ends too, or
the engine is started anew.
"""

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from quatom.engine.sampling import SamplingParams
from quatom.errors import EngineError, QuatomError
from quatom.serving import messages
from quatom.serving.async_engine import AsyncEngine, PreparedRequest
from quatom.serving.engine_launch import EnginePlan, EngineProcess
from quatom.serving.engine_state import EngineStats
from quatom.serving.messages import Report

logger = logging.getLogger("quatom.serving")

READ_AT_ONCE = 16
"""Messages read before other tasks have their turn."""
MAX_RESTARTS = 3
RESTART_WINDOW = 600.0
"""More than MAX_RESTARTS within so many seconds: something is wrong that no restart mends."""


class _RemoteRequest:
    """A request that the engine's process has checked and keeps until it is run or dropped."""

    __slots__ = ("__weakref__", "finalizer", "num_sequences", "request_id")

    def __init__(self, request_id: str, num_sequences: int) -> None:
        self.request_id = request_id
        self.num_sequences = num_sequences
        self.finalizer: weakref.finalize[Any, Any] | None = None


class ProcessEngine(AsyncEngine):
    """An engine in a process of its own."""

    def __init__(self, process: EngineProcess, tokenizer: Any, *, plan: EnginePlan | None) -> None:
        """Take over a process that is ready.

        Args:
            process: the engine's.
            tokenizer: the same as the engine's, for prompts.
            plan: start the engine anew by it when its process ends; None: stop for good.
        """
        super().__init__(process.facts, tokenizer)
        self._process = process
        self._plan = plan
        self._stats = EngineStats()
        self._queued = 0
        self._unseen: set[str] = set()
        self._preparing: dict[str, asyncio.Future[int]] = {}
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._restarting: asyncio.Task[None] | None = None
        self._stopping = False
        self._watched = self._heard = False
        self._reason: str | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.popen.pid

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats

    @property
    def num_waiting(self) -> int:
        """Sequences that waited after the last step, and requests sent since."""
        return self._stats.waiting + self._queued + len(self._unseen) + len(self._preparing)

    async def start(self) -> None:
        """Begin to read the engine's reports."""
        self._event_loop = asyncio.get_running_loop()
        self._watch()

    async def stop(self) -> None:
        """Let the process end."""
        self._stopping = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        self._process.send(messages.Quit())
        if self._watched:
            self._loop.remove_reader(self._process.reports.FD)
        await asyncio.to_thread(self._process.close)

    def shows_life(self) -> bool:
        """Whether the process has said anything since the last call, or there is none."""
        heard, self._heard = self._heard, False
        return heard or not self._watched

    def hang(self, message: str) -> None:
        """End every request. If it may be started anew, kill the process."""
        super().hang(message)
        self._refuse_all_to_prepare(message)
        if self._plan is not None:
            self._reason = message
            self._process.popen.kill()  # `_ended` does the rest

    async def make_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> _RemoteRequest:
        """Let the engine's process check a request, and keep it until it is run.

        It drops the request when this end cancels, or drops the result without running it.

        Raises:
            QuatomError: the request is not valid, or the engine has stopped.
        """
        self._check_running()
        answer: asyncio.Future[int] = self._loop.create_future()
        self._preparing[request_id] = answer
        try:
            self._process.send(messages.Prepare(request_id, prompt_ids, params))
            request = _RemoteRequest(request_id, await answer)
        except asyncio.CancelledError:
            self._process.send(messages.Drop(request_id))
            raise
        finally:
            del self._preparing[request_id]
        request.finalizer = weakref.finalize(request, self._forget, request_id)
        request.finalizer.atexit = False
        return request

    def _submit(self, request: PreparedRequest) -> None:
        assert isinstance(request, _RemoteRequest)
        assert request.finalizer is not None
        request.finalizer.detach()
        self._unseen.add(request.request_id)
        self._process.send(messages.Run(request.request_id))

    def _abort(self, request_id: str) -> None:
        self._unseen.discard(request_id)
        self._process.send(messages.Drop(request_id))

    def _forget(self, request_id: str) -> None:
        """Drop a request that nobody will run. Any thread may collect garbage."""
        self._call_soon(self._abort, request_id)

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing matters any more
            self._loop.call_soon_threadsafe(function, *arguments)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        assert self._event_loop is not None
        return self._event_loop

    def _watch(self) -> None:
        """Read the process's reports as they come, and wait for its end."""
        process = self._process

        def wait() -> None:
            process.popen.wait()
            self._call_soon(self._ended, process)

        self._watched = self._heard = True
        threading.Thread(target=wait, name="quatom-wait", daemon=True).start()
        logger.info("the engine runs", extra={"fields": {"pid": process.popen.pid}})
        self._loop.add_reader(process.reports.FD, self._read, process)
        self._read(process)

    def _read(self, process: EngineProcess) -> None:
        """Take reports until there is none: zmq signals only the first."""
        for _ in range(READ_AT_ONCE):
            if (report := process.receive()) is None:
                return
            self._take(report)
        self._loop.call_soon(self._read, process)

    def _take(self, report: Report) -> None:
        self._heard = True
        match report:
            case messages.Step(deltas, stats, queued, seen):
                self._stats, self._queued = stats, queued
                self._unseen.difference_update(seen)
                if deltas:
                    self._dispatch(deltas)
            case messages.Prepared(request_id, num_sequences):
                if request_id in self._preparing and not self._preparing[request_id].done():
                    self._preparing[request_id].set_result(num_sequences)
            case messages.Refused(request_id, failure):
                self._unseen.discard(request_id)
                if request_id in self._preparing:
                    self._refuse_to_prepare(request_id, failure.error())
                else:
                    self._refuse(request_id, failure.error())
            case messages.Stopped(message):
                self._reason = f"the engine has stopped: {message}"
                self._process.popen.kill()  # it is ending; `_ended` does the rest

    def _refuse_all_to_prepare(self, message: str) -> None:
        for request_id in self._preparing:
            self._refuse_to_prepare(request_id, EngineError(message))

    def _refuse_to_prepare(self, request_id: str, error: QuatomError) -> None:
        answer = self._preparing[request_id]
        if not answer.done():
            answer.set_exception(error)

    def _ended(self, process: EngineProcess) -> None:
        """The process is gone: answer everybody, then start it anew or stop for good."""
        if self._stopping:
            return
        self._watched = False
        while (report := process.receive()) is not None:  # its last words
            self._take(report)
        self._loop.remove_reader(process.reports.FD)
        process.close()
        reason, self._reason = self._reason or process.ending, None
        logger.error("the engine is gone", extra={"fields": {"reason": reason}})
        self._stats, self._queued = EngineStats(), 0
        self._unseen.clear()
        self._fail(reason)
        self._refuse_all_to_prepare(reason)
        if self._may_restart():
            self.error = f"{reason}; it is being started anew"
            self._restarting = self._loop.create_task(self._restart())
        else:
            self.on_stop()

    def _may_restart(self) -> bool:
        if self._plan is None:
            return False
        now = time.monotonic()
        full = len(self._restarts) == MAX_RESTARTS
        if full and now - self._restarts[0] < RESTART_WINDOW:
            logger.error("the engine has ended too often: it is not started again")
            return False
        self._restarts.append(now)
        return True

    async def _restart(self) -> None:
        assert self._plan is not None
        try:
            process = EngineProcess(self._plan)  # in this thread: the process ends with its starter
            await self._wait_until_ready(process)
        except Exception as error:
            self.error = f"the engine could not be started anew: {error}"
            logger.error("the engine could not be started anew: %s", error)
            self.on_stop()
            return
        self._process, self.facts, self.error = process, process.facts, None
        self.num_restarts += 1
        self._watch()

    async def _wait_until_ready(self, process: EngineProcess) -> None:
        try:
            await asyncio.to_thread(process.wait_until_ready)
        except asyncio.CancelledError:
            process.popen.kill()  # the thread that waits for it closes the rest
            raise
