"""Threads for what is slow about a request, such as tokenizing."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request as HttpRequest

Result = TypeVar("Result")

LARGE_BODY_BYTES = 2**18
"""Requests with larger bodies have threads of their own."""
_LARGE = ThreadPoolExecutor(2, thread_name_prefix="quatom-large")


async def in_thread(http: HttpRequest, work: Callable[[], Result]) -> Result:
    """Do some work of a request whose body was read by `read_body`, in a thread.

    Large requests wait for each other, and small ones for none of them.
    """
    threads = _LARGE if http.state.body_bytes > LARGE_BODY_BYTES else None
    return await asyncio.get_running_loop().run_in_executor(threads, work)
