"""The engine's process: `python -m quatom.serving.engine_process`, which `EngineProcess` starts.

Its first line of input says what to build and where the sockets are. Its input then stays open as
long as the server lives: when it ends, so does this process, whatever the engine is doing.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import zmq

from quatom.engine.engine import Engine
from quatom.engine.host_memory import forget_startup
from quatom.errors import QuatomError
from quatom.serving.engine_state import facts_of
from quatom.serving.engine_worker import Channel, Worker
from quatom.serving.logs import configure_logging
from quatom.serving.messages import Failure, NotStarted, Ready

logger = logging.getLogger("quatom.serving")

PR_SET_PDEATHSIG = 1


def build(plan: dict[str, Any]) -> Engine:
    """The engine of a plan: what the function called plan["factory"] makes of its arguments."""
    module, _, name = plan["factory"].partition(":")
    engine: Engine = getattr(import_module(module), name)(**plan["arguments"])
    return engine


def main() -> int:
    """Build the engine, report it, and run it until told to quit. Returns the exit status."""
    _end_with_the_server()
    plan = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_watch_input, name="quatom-watch", daemon=True).start()
    configure_logging(plan["log_level"])
    folder, context = Path(plan["folder"]), zmq.Context()
    channel = Channel(context, folder)
    try:
        engine = build(plan)
        engine.requests.warm_up()
    except Exception as error:
        if not isinstance(error, QuatomError | OSError):
            logger.exception("the engine cannot be built")
        channel.send(NotStarted(Failure.of(error)))
        channel.close()
        context.term()
        return 1
    worker = Worker(engine, channel)
    receiver = threading.Thread(target=worker.receive, args=(context, folder), daemon=True)
    receiver.start()
    forget_startup()
    channel.send(Ready(facts_of(engine)))
    worker.run()
    engine.requests.close()
    channel.close()
    context.term()
    return int(worker.failed_for_good)


def _end_with_the_server() -> None:
    """Neither SIGINT nor SIGTERM ends this process, and it does not outlive its server.

    A service manager may signal every process of a service. The server needs the engine until its
    requests are answered, and then tells it to quit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be handed down to processes of ours
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch_input() -> None:
    """End when the server's end of the pipe is closed, also where there is no prctl."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    status = main()
    # Threads that still prepare requests, and CUDA's own teardown, are nobody's loss.
    os._exit(status)
