"""Run the application with uvicorn: structured logs, and a SIGTERM that drains."""

import logging
import signal
from pathlib import Path

import uvicorn

from quatom.engine.engine import Engine
from quatom.errors import EngineError
from quatom.serving.app import ServerOptions, create_app
from quatom.serving.middleware import JsonFormatter


def configure_logging(level: str = "INFO") -> None:
    """One JSON line an event, on stderr, for ours and uvicorn's loggers."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("quatom", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)


def serve_engine(
    engine: Engine,
    options: ServerOptions,
    *,
    host: str,
    port: int,
    drain_seconds: int,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for `drain_seconds`.

    Raises:
        EngineError: the engine failed for good.
    """
    failures: list[str] = []

    def stop() -> None:
        failures.append(str(app.state.async_engine.error))
        server.should_exit = True

    app = create_app(engine, options, on_engine_stop=stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=drain_seconds,
            backlog=2048,
        )
    )
    # uvicorn raises the signal again when it has drained; that shall not look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run()
    if failures:
        raise EngineError(f"the engine has stopped: {failures[0]}")


def default_name(model: str) -> str:
    """The name a model is served under: its path or hub id as given, without a closing slash."""
    return str(Path(model)) if Path(model).exists() else model
