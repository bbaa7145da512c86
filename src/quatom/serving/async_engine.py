"""AsyncEngine: what asyncio tasks see of an engine, which runs in a thread or a process of its own.

Requests go to the engine as they come; a step's deltas come back to the event loop in one call, and
a task that falls behind finds the deltas of several steps at once.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from quatom.engine.outputs import SequenceDelta
from quatom.engine.sampling import SamplingParams
from quatom.errors import EngineError, QueueFullError
from quatom.serving.engine_state import EngineFacts, EngineStats


class PreparedRequest(Protocol):
    """A checked request, ready to run."""

    request_id: str

    @property
    def num_sequences(self) -> int:
        """Completions that it asks for."""


class AsyncEngine(ABC):
    """An engine and the streams of its requests. Methods belong to the event loop."""

    def __init__(self, facts: EngineFacts, tokenizer: Any) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self.error: str | None = None
        """Why no request can run; None while they can."""
        self.observe: Callable[[list[SequenceDelta]], None] = lambda deltas: None
        """Told of every step's deltas."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called when the engine has failed for good."""
        self._streams: dict[str, asyncio.Queue[SequenceDelta | Exception]] = {}

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """The engine's state, as far as it is known here."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Sequences that wait, those included that the engine has not seen yet."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to run, in the event loop that will read the streams."""

    @abstractmethod
    async def stop(self) -> None:
        """End after the current step. Requests still running are dropped."""

    @abstractmethod
    async def make_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> PreparedRequest:
        """Check a request; what is slow about that, such as a grammar, holds up nobody else.

        Raises:
            RequestError: see `RequestFactory.make`.
            EngineError: the engine has stopped.
        """

    @abstractmethod
    def _submit(self, request: PreparedRequest) -> None:
        """Let the engine run a request."""

    @abstractmethod
    def _abort(self, request_id: str) -> None:
        """Let the engine drop a request."""

    def check_room(self, num_requests: int) -> None:
        """Refuse requests that the queue has no room for.

        Raises:
            QueueFullError: it has not.
            EngineError: the engine has stopped.
        """
        self._check_running()
        limit, waiting = self.facts.max_waiting, self.num_waiting
        if limit is not None and waiting + num_requests > limit:
            raise QueueFullError(
                f"{waiting} requests are waiting and {num_requests} more do not fit into a queue "
                f"of {limit}; try again later"
            )

    async def stream(self, request: PreparedRequest) -> AsyncGenerator[list[SequenceDelta], None]:
        """Run a request. Yields what has come since the last time; closing it aborts.

        Raises:
            EngineError: the engine stopped or refused the request.
        """
        self._check_running()
        request_id, open_sequences = request.request_id, request.num_sequences
        stream: asyncio.Queue[SequenceDelta | Exception] = asyncio.Queue()
        self._streams[request_id] = stream
        self._submit(request)
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
                self._abort(request_id)

    def _check_running(self) -> None:
        if self.error is not None:
            raise EngineError(self.error)

    def _dispatch(self, deltas: list[SequenceDelta]) -> None:
        """Hand a step's deltas to their streams."""
        self.observe(deltas)
        for delta in deltas:
            self._put(delta.request_id, delta)

    def _put(self, request_id: str, item: SequenceDelta | Exception) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put_nowait(item)

    def _fail(self, message: str) -> None:
        """End every request with an error, and let no other begin."""
        self.error = message
        for stream in self._streams.values():
            stream.put_nowait(EngineError(message))
