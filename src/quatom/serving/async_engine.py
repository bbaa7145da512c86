"""AsyncEngine: one thread runs the engine, asyncio tasks read the streams of their requests.

Commands go to the thread through a queue; a step's deltas come back to the event loop in one call.
A step that raises ends the requests that were running, with the error. If it keeps happening, or
the device itself failed, the engine stops for good and says so: `error` is set, every request ends
and `on_stop` is called.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from quatom.engine.engine import Engine
from quatom.engine.outputs import SequenceDelta
from quatom.engine.requests import Request
from quatom.engine.sampling import SamplingParams
from quatom.errors import EngineError, QueueFullError

logger = logging.getLogger("quatom.serving")

MAX_FAILED_STEPS = 3
"""Steps in a row that may raise before the engine stops."""


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class _Stop:
    pass


Command = Request | _Abort | _Stop


class AsyncEngine:
    """An engine in a thread of its own. Methods but `start` belong to the event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        observe: Callable[[SequenceDelta], None] = lambda delta: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap an engine that nothing else uses.

        Args:
            observe: told of every delta, in the event loop.
            on_stop: called in the event loop when the engine has failed for good.
        """
        self.engine = engine
        self.error: str | None = None
        self._observe = observe
        self._on_stop = on_stop
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[SequenceDelta | Exception]] = {}
        self._thread = threading.Thread(target=self._run, name="quatom-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def start(self) -> None:
        """Start the thread; call inside the event loop that will read the streams."""
        self._loop = asyncio.get_running_loop()
        self.engine.requests.warm_up()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step. Requests still running are dropped."""
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        self.engine.requests.close()

    async def make_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> Request:
        """`Engine.make_request`; compiling a constraint does not block the event loop.

        Cancelling gives the compilation up.
        """
        if params.structured is None:
            return self.engine.make_request(request_id, prompt_ids, params)
        compilation = self.engine.requests.compile(params.structured)
        try:
            constraint = await asyncio.wrap_future(compilation.future)
        except asyncio.CancelledError:
            compilation.cancel()
            raise
        return self.engine.make_request(request_id, prompt_ids, params, constraint)

    def check_room(self, num_requests: int) -> None:
        """Refuse requests that the queue has no room for.

        Raises:
            QueueFullError: it has not.
            EngineError: the engine has stopped.
        """
        if self.error is not None:
            raise EngineError(f"the engine has stopped: {self.error}")
        limit = self.engine.config.max_waiting
        waiting = len(self.engine.scheduler.waiting) + self._commands.qsize()
        if limit is not None and waiting + num_requests > limit:
            raise QueueFullError(
                f"{waiting} requests are waiting and {num_requests} more do not fit into a queue "
                f"of {limit}; try again later"
            )

    async def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta], None]:
        """Run a request. Yields what has come since the last time; closing it aborts.

        Raises:
            EngineError: the engine stopped or refused the request.
        """
        request_id, open_sequences = request.request_id, len(request.sequences)
        stream: asyncio.Queue[SequenceDelta | Exception] = asyncio.Queue()
        self._streams[request_id] = stream
        self._commands.put(request)
        try:
            while open_sequences:
                news = [await stream.get()]
                while not stream.empty():
                    news.append(stream.get_nowait())
                deltas = []
                for item in news:
                    if isinstance(item, Exception):
                        raise item
                    deltas.append(item)
                open_sequences -= sum(d.finish_reason is not None for d in deltas)
                yield deltas
        finally:
            self._streams.pop(request_id, None)
            if open_sequences:
                self._commands.put(_Abort(request_id))

    def _run(self) -> None:
        """The engine's thread."""
        failed_steps = 0
        while True:
            if not self._obey():
                return
            try:
                deltas = self.engine.step()
                failed_steps = 0
            except Exception as error:
                logger.exception("a step failed")
                failed_steps += 1
                message = f"{type(error).__name__}: {error}"
                fatal = self.engine.device.type == "cuda" or isinstance(error, EngineError)
                if fatal or failed_steps >= MAX_FAILED_STEPS:
                    self._in_loop(self._fail, message)
                    return
                deltas = self.engine.fail_running(message)
            if deltas:
                self._in_loop(self._dispatch, deltas)

    def _obey(self) -> bool:
        """Carry out commands, waiting for one if there is nothing else to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            match command:
                case _Stop():
                    return False
                case _Abort(request_id):
                    self.engine.abort(request_id)
                case Request():
                    try:
                        self.engine.add(command)
                    except EngineError as error:
                        self._in_loop(self._put, command.request_id, error)

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.info("deltas dropped: the event loop is closed")

    def _dispatch(self, deltas: list[SequenceDelta]) -> None:
        for delta in deltas:
            self._observe(delta)
            self._put(delta.request_id, delta)

    def _put(self, request_id: str, item: SequenceDelta | Exception) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put_nowait(item)

    def _fail(self, message: str) -> None:
        self.error = message
        for stream in self._streams.values():
            stream.put_nowait(EngineError(f"the engine has stopped: {message}"))
        self._on_stop()
