"""Run the application with uvicorn: structured logs, and a SIGTERM that drains."""

import logging
import signal
import socket
from dataclasses import dataclass

import uvicorn

from quatom.engine.engine import Engine
from quatom.engine.host_memory import forget_startup
from quatom.errors import EngineError
from quatom.serving.app import ServerOptions, create_app
from quatom.serving.async_engine import AsyncEngine
from quatom.serving.connections import Tls, url_of

logger = logging.getLogger("quatom.serving")

FAILED_DRAIN_SECONDS = 2
"""How long answers may take to leave once the engine has failed for good: all are errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """How clients reach a server, and for how long."""

    listener: socket.socket
    """Made by `open_listener`."""
    tls: Tls | None = None
    keep_alive_seconds: int = 75
    """How long an idle connection stays open: longer than clients and proxies that pool keep it,
    so that none sends a request into a connection that is being closed."""
    drain_seconds: int = 60
    """How long requests may go on after SIGTERM."""


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    url = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.info("listening", extra={"fields": {"url": self.url}})


def serve_engine(
    engine: Engine | AsyncEngine, options: ServerOptions, connections: Connections
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    Raises:
        EngineError: the engine failed for good.
    """
    failures: list[str] = []

    def stop() -> None:
        failures.append(str(app.state.async_engine.error))
        server.config.timeout_graceful_shutdown = FAILED_DRAIN_SECONDS
        server.should_exit = True

    app = create_app(engine, options, on_engine_stop=stop)
    tls, listener = connections.tls, connections.listener
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=connections.drain_seconds,
            timeout_keep_alive=connections.keep_alive_seconds,
            backlog=2048,
            ssl_certfile=None if tls is None else tls.certfile,
            ssl_keyfile=None if tls is None else tls.keyfile,
        )
    )
    server.url = url_of(listener, tls)

    def leave(*_: object) -> None:
        server.should_exit = True

    # A signal counts before uvicorn has handlers of its own, too. When it has drained, it raises
    # the signal again, which shall not look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    forget_startup()
    server.run(sockets=[listener])
    if failures:
        raise EngineError(failures[0])
