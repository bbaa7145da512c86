"""A server around the hash model, on a real socket of this machine, in a thread of this process."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.serving.app import ServerOptions, create_app
from tests.engine.doubles import byte_tokenizer, hash_loaded


def make_engine(num_blocks=4000, *, loaded_options=None, max_position=512, **options):
    defaults = dict(max_num_seqs=64, max_num_batched_tokens=256, block_size=16, max_waiting=1000)
    config = EngineConfig(**{**defaults, **options, "kv_cache_memory": num_blocks * 16 * 8})
    loaded = hash_loaded(
        tokenizer=byte_tokenizer(), max_position=max_position, **(loaded_options or {})
    )
    return Engine(loaded, config)


@contextmanager
def running_server(engine, *, uvicorn_options=None, **options):
    """Yields url, app and engine of a running server."""
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


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def assert_idle(engine):
    """Nothing runs, and no KV block is lost."""
    wait_until(lambda: not engine.has_work)
    engine.check_accounting()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.fixture(scope="package")
def server():
    with running_server(make_engine()) as running:
        yield running
        assert_idle(running.engine)
