"""What completions and chat share: running requests to their end, or streaming them."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from starlette.requests import Request as HttpRequest

from quatom.engine.llm import empty_output
from quatom.engine.outputs import RequestOutput, SequenceDelta
from quatom.engine.sampling import SamplingParams
from quatom.serving.api_errors import ApiError
from quatom.serving.async_engine import AsyncEngine, PreparedRequest
from quatom.serving.prompt import PromptEncoder
from quatom.serving.responses import usage

CLIENT_CLOSED = 499
"""Status logged for a client that did not wait for its answer (it never sees it)."""


@dataclass(frozen=True, slots=True)
class Service:
    """What routes work with."""

    engine: AsyncEngine
    encoder: PromptEncoder
    model_names: tuple[str, ...]
    """Names that requests may use; the first one is reported."""
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> str:
        """The name to report.

        Raises:
            ApiError: 404, another model was asked for.
        """
        if name is not None and name not in self.model_names:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"the model {name!r} does not exist; this server has {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )
        return name or self.model_names[0]


class Generation:
    """The engine requests of one HTTP request, one for each prompt, and what came of them."""

    def __init__(
        self, service: Service, kind: str, model: str, params: SamplingParams, http: HttpRequest
    ) -> None:
        self.service = service
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.model = model
        self.params = params
        self.created = int(time.time())
        self.requests: list[PreparedRequest] = []
        self.outputs: list[RequestOutput] = []
        self._http = http

    async def prepare(self, prompts: list[list[int]], *, shorten: bool = False) -> None:
        """Check every prompt, and that the queue has room for them all.

        Args:
            prompts: token ids.
            shorten: where fewer tokens fit than max_tokens, generate those; else that is an error.
        """
        self.service.engine.check_room(len(prompts))
        if self.params.structured is None:
            await self._make_requests(prompts, shorten)
        else:  # compiling a constraint may take a while
            await self._while_connected(self._make_requests(prompts, shorten))

    async def _make_requests(self, prompts: list[list[int]], shorten: bool) -> None:
        params = [self._that_fit(p) if shorten else self.params for p in prompts]

        def make(i: int) -> Coroutine[Any, Any, PreparedRequest]:
            return self.service.engine.make_request(f"{self.id}-{i}", prompts[i], params[i])

        # The first one alone: the others find its constraint compiled, and need not take turns.
        first = await make(0)
        self.requests = [first, *await asyncio.gather(*map(make, range(1, len(prompts))))]
        self.outputs = [
            empty_output(request.request_id, prompt, prompt, fitting)
            for request, prompt, fitting in zip(self.requests, prompts, params, strict=True)
        ]

    def _that_fit(self, token_ids: list[int]) -> SamplingParams:
        room = self.service.engine.facts.max_model_len - len(token_ids)
        wanted = self.params.max_tokens
        fits = wanted is None or room >= wanted or room < 1  # none at all: the engine says so
        return self.params if fits else replace(self.params, max_tokens=room)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(len(c.token_ids) for output in self.outputs for c in output.outputs)

    def usage(self) -> dict[str, object]:
        """The usage object, so far."""
        return usage(
            sum(len(output.prompt_token_ids) for output in self.outputs),
            self.num_completion_tokens,
            sum(output.num_cached_tokens for output in self.outputs),
        )

    async def finish(self) -> None:
        """Run everything; outputs are complete afterwards.

        Raises:
            ApiError: the engine failed, or the client is gone.
        """
        await self._while_connected(self._run_all())

    async def _while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work, and give it up when the client leaves.

        Raises:
            ApiError: the client is gone.
        """
        running = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._wait_for_disconnect())
        try:
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise ApiError(CLIENT_CLOSED, "the client is gone", kind="client_error")
            running.result()
        finally:
            for task in (running, gone):
                task.cancel()
            await asyncio.gather(running, gone, return_exceptions=True)

    async def deltas(self) -> AsyncGenerator[tuple[int, SequenceDelta], None]:
        """(prompt's number, delta) as they come; outputs grow along."""
        if len(self.requests) == 1:
            async with aclosing(self._one(0)) as stream:
                async for pair in stream:
                    yield pair
            return
        merged: asyncio.Queue[tuple[int, SequenceDelta] | Exception | None] = asyncio.Queue()

        async def forward(i: int) -> None:
            try:
                async with aclosing(self._one(i)) as stream:
                    async for pair in stream:
                        merged.put_nowait(pair)
                merged.put_nowait(None)
            except Exception as error:  # handed to the reader below, which raises it
                merged.put_nowait(error)

        tasks = [asyncio.ensure_future(forward(i)) for i in range(len(self.requests))]
        try:
            for _ in tasks:
                while (item := await merged.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, i: int) -> AsyncGenerator[tuple[int, SequenceDelta], None]:
        async with aclosing(self.service.engine.stream(self.requests[i])) as stream:
            async for deltas in stream:
                for delta in deltas:
                    if delta.finish_reason == "error":
                        raise failure(delta)
                    self.outputs[i].add(delta)
                    yield i, delta

    async def _run_all(self) -> None:
        async with aclosing(self.deltas()) as stream:
            async for _ in stream:
                pass

    async def _wait_for_disconnect(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass


def failure(delta: SequenceDelta) -> ApiError:
    """Why a completion ended early: the request's own constraint, or the engine."""
    if delta.refused:
        return ApiError(HTTPStatus.BAD_REQUEST, str(delta.error), code="constraint_too_costly")
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"generation failed: {delta.error}",
        kind="server_error",
        code="engine_error",
    )
