"""An engine that is there and does nothing: it is noticed, nobody waits, and it may go on."""

import asyncio
import os
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch

from quatom.loading import load
from quatom.modeling.context import full_sequences_context
from quatom.modeling.decoder import Decoder
from quatom.serving import hang_watch
from quatom.serving.engine_loop import EngineLoop
from tests.serving.conftest import (
    assert_server_idle,
    process_engine,
    running_server,
    wait_until,
)
from tests.serving.engines import make_engine
from tests.serving.test_engine_process import Clients, completion, kill

SECONDS = 3.0
"""The bound: six times what an engine needs to say that it lives."""
REASON = "the engine has made no progress for 3 s"


def status(server):
    answer = httpx.get(f"{server.url}/health")
    return answer.status_code, answer.text


def metric(server, name):
    text = httpx.get(f"{server.url}/metrics").text
    return float(text.partition(f'\nquatom:{name}{{model_name="hash"}} ')[2].split("\n")[0])


def check_hang(server):
    """Every client is told, health and metrics show it, and nobody else is let in."""
    wait_until(lambda: status(server)[0] == 503, seconds=30)
    assert REASON in status(server)[1]
    answer = httpx.post(f"{server.url}/v1/completions", json=completion())
    assert (answer.status_code, REASON in answer.text) == (503, True)
    assert (metric(server, "engine_up"), metric(server, "engine_hangs_total")) == (0, 1)


def check_well(server):
    wait_until(lambda: status(server)[0] == 200, seconds=120)
    body = completion(max_tokens=5)
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    assert_server_idle(server)
    assert metric(server, "engine_up") == 1


def test_a_halted_process_is_noticed_and_goes_on():
    with running_server(process_engine(step_seconds=0.02), hang_seconds=SECONDS) as server:
        pid = server.app.state.async_engine.pid
        clients = Clients(server.url)
        os.kill(pid, signal.SIGSTOP)
        try:
            check_hang(server)
            clients.check(time.monotonic(), REASON)
        finally:
            os.kill(pid, signal.SIGCONT)
        check_well(server)


def test_a_halted_process_is_started_anew_but_not_for_ever():
    stopped = threading.Event()
    engine = process_engine(step_seconds=0.02, restart=True)
    with running_server(engine, hang_seconds=SECONDS) as server:
        engine.on_stop = stopped.set
        first = engine.pid
        clients = Clients(server.url)
        os.kill(first, signal.SIGSTOP)
        wait_until(lambda: "being started anew" in status(server)[1], seconds=30)
        clients.check(time.monotonic(), REASON)
        assert REASON in status(server)[1]
        check_well(server)
        assert engine.pid != first
        assert metric(server, "engine_restarts_total") == 1
        assert not stopped.is_set()
        engine._restarts.extend([time.monotonic()] * engine._restarts.maxlen)
        kill(server)
        assert stopped.wait(timeout=5)
        assert "SIGKILL" in status(server)[1]


def test_a_thread_that_is_stuck_is_noticed_and_goes_on():
    engine, free = make_engine(step_seconds=0.02), threading.Event()
    free.set()
    forward = engine.runner.model.forward
    engine.runner.model.forward = lambda *given: (free.wait(60), forward(*given))[1]
    with running_server(engine, hang_seconds=SECONDS) as server:
        clients = Clients(server.url, count=2)
        free.clear()
        check_hang(server)
        clients.check(time.monotonic(), REASON)
        free.set()
        check_well(server)


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ("....L", ["hang", "resume"]),
        ("...L...L", []),
        ("L........LL....", ["hang", "resume", "hang"]),
        ("L" * 9, []),
    ],
)
def test_silence_is_counted_in_looks(monkeypatch, looks, told):
    monkeypatch.setattr(hang_watch, "CHECK_SECONDS", 0.25)
    seen, script = [], iter(looks)

    class Engine(SimpleNamespace):
        def shows_life(self):
            if (look := next(script, None)) is None:
                raise EOFError
            return look == "L"

        def hang(self, message):
            self.hung = True
            seen.append("hang")
            assert "no progress for 1 s" in message

        def resume(self):
            self.hung = False
            seen.append("resume")

    async def at_once(seconds):
        assert seconds == 0.25

    monkeypatch.setattr(hang_watch, "asyncio", SimpleNamespace(sleep=at_once))
    with pytest.raises(EOFError):
        asyncio.run(hang_watch._watch(Engine(hung=False), 1.0))
    assert seen == told


def test_a_long_step_shows_life_by_its_blocks(tiny_llama_dir):
    loaded = load(tiny_llama_dir)
    assert isinstance(loaded.model, Decoder)
    engine = SimpleNamespace(runner=SimpleNamespace(model=loaded.model))
    loop, seen = EngineLoop(engine, listener=None), []
    loop.shows_life()
    for block in loaded.model.blocks:
        block.heads.register_forward_hook(lambda *_: seen.append(loop.shows_life()))
    with torch.inference_mode():
        context = full_sequences_context(1, 16, 16, loaded.device)
        loaded.model(torch.arange(16), context, loaded.model.allocate_kv_cache(1, 16))
    assert seen == [True, True]
    assert not loop.shows_life()
