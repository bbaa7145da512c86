"""ThreadEngine: the engine in a thread of this process. Tests and `quatom run-batch` use it."""

import asyncio
import logging
import threading
from collections.abc import Callable

from quatom.engine.engine import Engine
from quatom.engine.outputs import SequenceDelta
from quatom.engine.requests import Request
from quatom.engine.sampling import SamplingParams
from quatom.errors import QuatomError
from quatom.serving.async_engine import AsyncEngine, PreparedRequest
from quatom.serving.engine_loop import Abort, EngineLoop, Stop
from quatom.serving.engine_state import EngineStats, facts_of, stats_of

logger = logging.getLogger("quatom.serving")


class ThreadEngine(AsyncEngine):
    """An engine that nothing else uses, in a thread beside the event loop."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(facts_of(engine), engine.tokenizer)
        self.engine = engine
        self._engine_loop = EngineLoop(engine, self)
        self._thread = threading.Thread(
            target=self._engine_loop.run, name="quatom-engine", daemon=True
        )
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def stats(self) -> EngineStats:
        """The engine's state."""
        return stats_of(self.engine)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, and commands that the engine has not seen yet."""
        return len(self.engine.scheduler.waiting) + self._engine_loop.commands.qsize()

    async def start(self) -> None:
        """Start the thread."""
        self._event_loop = asyncio.get_running_loop()
        self.engine.requests.warm_up()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread."""
        self._engine_loop.commands.put(Stop())
        await asyncio.to_thread(self._thread.join)
        self.engine.requests.close()

    async def make_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> Request:
        """`Engine.make_request`; compiling a constraint does not block the event loop.

        Cancelling gives the compilation up.
        """
        self._check_running()
        if params.structured is None:
            return self.engine.make_request(request_id, prompt_ids, params)
        compilation = self.engine.requests.compile(params.structured)
        try:
            constraint = await asyncio.wrap_future(compilation.future)
        except asyncio.CancelledError:
            compilation.cancel()
            raise
        return self.engine.make_request(request_id, prompt_ids, params, constraint)

    def shows_life(self) -> bool:
        """Whether the engine has done anything since the last call, or has nothing to do."""
        return not self._thread.is_alive() or self._engine_loop.shows_life()

    def _submit(self, request: PreparedRequest) -> None:
        assert isinstance(request, Request)
        self._engine_loop.commands.put(request)

    def _abort(self, request_id: str) -> None:
        self._engine_loop.commands.put(Abort(request_id))

    # The engine's thread calls these; each is one call of the event loop.

    def stepped(self, deltas: list[SequenceDelta]) -> None:
        """Hand the deltas over."""
        if deltas:
            self._call(self._dispatch, deltas)

    def idle(self) -> None:
        """Nothing to report."""

    def refused(self, request_id: str, error: QuatomError) -> None:
        """End the request's stream."""
        self._call(self._refuse, request_id, error)

    def failed(self, message: str) -> None:
        """End every stream."""
        self._call(self._stop_for_good, f"the engine has stopped: {message}")

    def _stop_for_good(self, message: str) -> None:
        self._fail(message)
        self.on_stop()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.info("deltas dropped: the event loop is closed")
