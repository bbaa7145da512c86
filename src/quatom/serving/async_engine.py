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

    @property
    def request_id(self) -> str:
        """What its deltas are marked with."""

    @property
    def num_sequences(self) -> int:
        """Completions that it asks for."""


class _Mailbox:
    """What has come for one request. It is taken whole, which costs less than a queue."""

    __slots__ = ("arrival", "deltas", "error")

    def __init__(self) -> None:
        self.deltas: list[SequenceDelta] = []
        self.error: Exception | None = None
        self.arrival = asyncio.Event()

    async def take(self) -> list[SequenceDelta]:
        """Wait for deltas and take them all; an error comes before them."""
        await self.arrival.wait()
        self.arrival.clear()
        if self.error is not None:
            raise self.error
        deltas, self.deltas = self.deltas, []
        return deltas


class AsyncEngine(ABC):
    """An engine and the streams of its requests. Methods belong to the event loop."""

    def __init__(self, facts: EngineFacts, tokenizer: Any) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self.error: str | None = None
        """Why no request can run; None while they can."""
        self.hung = False
        """Whether `error` says so."""
        self.num_hangs = 0
        self.num_restarts = 0
        self.observe: Callable[[list[SequenceDelta]], None] = lambda deltas: None
        """Told of every step's deltas."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called when the engine has failed for good."""
        self._streams: dict[str, _Mailbox] = {}

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
    def shows_life(self) -> bool:
        """Whether the engine has done anything since the last call, or has nothing to do."""

    def hang(self, message: str) -> None:
        """End every stream of an engine that shows no life; `resume` lets others begin."""
        self._fail(message)
        self.hung = True
        self.num_hangs += 1

    def resume(self) -> None:
        """Go on: the engine was slow, or something had halted it."""
        self.error, self.hung = None, False

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
        mailbox = self._streams[request_id] = _Mailbox()
        self._submit(request)
        try:
            while open_sequences:
                deltas = await mailbox.take()
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
            mailbox = self._streams.get(delta.request_id)
            if mailbox is not None:
                mailbox.deltas.append(delta)
                mailbox.arrival.set()

    def _refuse(self, request_id: str, error: Exception) -> None:
        """End one request with an error."""
        mailbox = self._streams.get(request_id)
        if mailbox is not None:
            mailbox.error = error
            mailbox.arrival.set()

    def _fail(self, message: str) -> None:
        """End every request with an error, and let no other begin."""
        self.error, self.hung = message, False
        for request_id in self._streams:
            self._refuse(request_id, EngineError(message))
