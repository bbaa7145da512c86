"""Notice an engine that is there and does nothing: a kernel that never ends, a process halted."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from quatom.errors import ServerError

if TYPE_CHECKING:
    from quatom.serving.async_engine import AsyncEngine

logger = logging.getLogger("quatom.serving")

CHECK_SECONDS = 0.5
SHORTEST_BOUND = 2.0
"""Seconds. An engine says twice a second that it lives, and the machine may be busy."""


def check_bound(seconds: float) -> None:
    """Refuse a bound that an engine in good health would exceed.

    Raises:
        ServerError: it is neither 0 nor SHORTEST_BOUND or more.
    """
    if seconds != 0 and not SHORTEST_BOUND <= seconds < math.inf:
        raise ServerError(
            f"--hang-seconds {seconds:g} is neither 0 (never) nor {SHORTEST_BOUND:g} or more"
        )


@asynccontextmanager
async def watched(engine: "AsyncEngine", seconds: float) -> AsyncIterator[None]:
    """Watch an engine as long as the context lasts; 0 seconds: do not."""
    task = asyncio.create_task(_watch(engine, seconds)) if seconds else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _watch(engine: "AsyncEngine", seconds: float) -> None:
    """Tell an engine that shows no life for `seconds` that it hangs, and let it go on if it does.

    It counts looks, not time: after this process was halted too, the engine has its whole time.
    """
    silent, bound = 0, round(seconds / CHECK_SECONDS)
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        silent = 0 if engine.shows_life() else silent + 1
        if silent == bound:
            message = (
                f"the engine has made no progress for {seconds:g} s; if its steps take that long, "
                "give --hang-seconds more"
            )
            logger.error("the engine hangs", extra={"fields": {"reason": message}})
            engine.hang(message)
        elif silent == 0 and engine.hung:
            logger.warning("the engine goes on")
            engine.resume()
