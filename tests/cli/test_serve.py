"""`quatom serve` as users run it: it listens, answers and ends with the right status."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from threading import Thread

import httpx
import pytest

from tests.serving.conftest import wait_until

MODES = ("--engine-process", "--no-engine-process")


@contextmanager
def serving(*arguments, listens=True, flags=()):
    """Yields (process, log lines, url) of `quatom serve`, run with these flags of Python."""
    command = [sys.executable, *flags, "-m", "quatom", "serve", *map(str, arguments)]
    command += ["--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "QUATOM_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    reader = Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
    reader.start()

    def url():
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return next((e["url"] for e in events if e["event"] == "listening"), None)

    try:
        if listens:
            wait_until(lambda: url() or process.poll() is not None, seconds=240)
        yield process, lines, url()
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)


def listens_at(url):
    try:
        return httpx.get(f"{url}/ping").status_code
    except (httpx.NetworkError, httpx.RemoteProtocolError):  # closed before it was accepted
        return None


def test_it_answers_and_ends_with_its_engine(small_dir, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    with serving(small_dir, MODES[0], "--api-key-file", keys) as (process, lines, url):
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{url}/ping").status_code == 200
        events = [json.loads(line) for line in lines]
        os.kill(next(e["pid"] for e in events if e["event"] == "the engine runs"), signal.SIGKILL)
        assert process.wait(timeout=20) == 1
    assert lines[-1] == "quatom: the engine's process was killed by SIGKILL\n"


@pytest.mark.parametrize(
    ("mode", "number"), [(MODES[0], signal.SIGINT), (MODES[1], signal.SIGTERM)]
)
def test_a_signal_lets_running_requests_finish_and_ends_it(small_dir, mode, number):
    """Meanwhile one that loads and serves a checkpoint shows what it imports."""
    body = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True, "n": 16, "stream": True}
    flags = ("-X", "importtime") if mode == MODES[1] else ()
    with serving(small_dir, mode, flags=flags) as (process, lines, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(number)
            wait_until(lambda: not listens_at(url), seconds=30)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert len(rest) > 10
        assert process.wait(timeout=30) == 0
    imported = [line.split("|")[-1].strip() for line in lines if line.startswith("import time:")]
    assert bool(imported) == bool(flags)
    assert not flags or "quatom.engine.engine" in imported
    assert not [module for module in imported if module.startswith("quatom.benchmark")]
    logged = [json.loads(line) for line in lines if not line.startswith("import time:")]
    assert any(e["event"] == "request" and e["path"] == "/v1/completions" for e in logged)


# No model of pipes is read otherwise.
PIPES_ARE_FILES = """
from pathlib import Path

Path.is_file = lambda path: path.exists() and not path.is_dir()
"""


# Where the server itself loads, the signal meets nothing but the loader: the simpler case.
@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)])
def test_sigterm_ends_it_while_it_loads(tmp_path, mode, monkeypatch):
    os.mkfifo(tmp_path / "config.json")  # whoever reads it waits for ever
    (tmp_path / "sitecustomize.py").write_text(PIPES_ARE_FILES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "model.safetensors").touch()

    def is_read():
        try:
            files.append(os.open(tmp_path / "config.json", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    files = []
    with serving(tmp_path, mode, listens=False) as (process, lines, _):
        wait_until(lambda: is_read() or process.poll() is not None, seconds=240)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    os.close(files[0])
    assert lines == []


def test_a_bad_model_is_the_same_error_in_either_process(shell, tmp_path, serve_in_process):
    said = [shell.fails("serve", tmp_path / "absent", mode, "--port", 0) for mode in MODES]
    assert said[0] == said[1]
    assert "absent" in said[0]
