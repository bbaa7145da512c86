"""Servers around the hash model, on real sockets of this machine, in a thread of this process."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn

from quatom.serving.app import ServerOptions, create_app
from quatom.serving.engine_launch import EnginePlan, EngineProcess
from quatom.serving.process_engine import ProcessEngine
from quatom.serving.thread_engine import ThreadEngine
from tests.engine.doubles import byte_tokenizer
from tests.serving.engines import make_engine

MODES = ("thread", "process")
"""Where the engine runs."""


@contextmanager
def running_server(engine, *, uvicorn_options=None, **options):
    """Yields url, port, app and engine of a running server; engine may be an AsyncEngine too."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(engine, ServerOptions(model_names=("hash", "alias"), **options))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        **(uvicorn_options or {}),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = listener.getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", app=app, engine=engine, port=port)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
    assert not thread.is_alive()


def wait_until(condition, seconds=10.0, pause=0.005):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)


def process_engine(*, restart=False, **options):
    """`make_engine(**options)` in a process of its own."""
    plan = EnginePlan(factory="tests.serving.engines:make_engine", arguments=options)
    process = EngineProcess(plan)
    process.wait_until_ready()
    return ProcessEngine(process, byte_tokenizer(), plan=plan if restart else None)


def engine_in(mode, **options):
    """`make_engine(**options)` where `mode` says."""
    return {"thread": make_engine, "process": process_engine}[mode](**options)


def assert_idle(engine):
    """Nothing runs, and no KV block is lost."""
    wait_until(lambda: not engine.has_work)
    engine.check_accounting()
    assert engine.pool.num_free == engine.pool.num_blocks


def assert_server_idle(server):
    """The same, wherever the engine runs; and nobody waits for it."""
    engine = server.app.state.async_engine
    wait_until(lambda: engine.num_streams == engine.num_waiting == engine.stats.running == 0)
    wait_until(lambda: engine.stats.kv_usage == 0)
    if isinstance(engine, ThreadEngine):
        assert_idle(engine.engine)


FAILS_ON = [299, 298, 299]
"""A step that sees this prompt raises."""


@pytest.fixture(scope="package")
def server():
    with running_server(make_engine(loaded_options={"fail_on": FAILS_ON})) as running:
        yield running
        assert_idle(running.engine)


@pytest.fixture(scope="package")
def process_server():
    engine = process_engine(loaded_options={"fail_on": FAILS_ON})
    with running_server(engine) as running:
        yield running
        assert_server_idle(running)
    assert engine._process.popen.returncode == 0


@pytest.fixture(params=MODES)
def either_server(request):
    """A server of each kind."""
    return request.getfixturevalue({"thread": "server", "process": "process_server"}[request.param])
