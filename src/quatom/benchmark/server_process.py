"""`quatom serve` in a process of its own, for as long as a benchmark needs it."""

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from quatom.engine.child_process import start_module
from quatom.errors import EngineError

_STOP_SECONDS = 30


@contextmanager
def serve_process(arguments: Sequence[str], *, start_seconds: float = 900.0) -> Iterator[str]:
    """Run `quatom serve ARGUMENTS` on a free port; yields its URL once it answers.

    Raises:
        EngineError: it ended, or did not answer within `start_seconds`.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--port", str(port), "--log-level", "WARNING")
    process = start_module("quatom", "serve", *arguments, *options)
    try:
        _wait(process, url, start_seconds)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise EngineError(
                f"quatom serve ended with status {status} before it answered; its own message is "
                "above"
            )
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.2)
    raise EngineError(f"quatom serve did not answer at {url} within {seconds:.0f} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
