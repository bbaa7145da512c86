"""docs/quickstart.md and the README's quickstart: their commands, run on a tiny model."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.conftest import LLAMA, make_model
from tests.doc_commands import ROOT, commands_of

pytestmark = pytest.mark.slow  # a process for every command

PAGES = {"README.md": "Qwen/Qwen2.5-0.5B-Instruct", "docs/quickstart.md": "MODEL"}
SMALLER = {"512": "24", "32": "2", "8": "1"}
"""Lengths and numbers of the page, for a model of 512 positions and a text of 40 KB."""


@pytest.fixture(params=PAGES)
def page(request):
    return request.param, (ROOT / request.param).read_text(encoding="utf-8")


def test_the_quickstart(page, text_file, tmp_path):
    name, text = page
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2}
    make_model(tmp_path / "model", config | {"num_key_value_heads": 1})
    for file in ("text.txt", "other-text.txt"):
        (tmp_path / file).write_bytes(text_file.read_bytes())
    section = text.split("## Quickstart")[-1].split("## Results")[0]
    commands = commands_of(section)
    assert [words[0] for words in commands if words[0] in ("quantize", "serve")] == [
        "quantize",
        "serve",
    ]
    for words in commands:
        words = [{PAGES[name]: "model", **SMALLER}.get(word, word) for word in words]
        if words[0] == "eval":
            words += ["--sequence-length", "64"]
        if words[0] != "serve":
            subprocess.run([sys.executable, "-m", "quatom", *words], cwd=tmp_path, check=True)
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words[words.index("8000")] = str(port)
        server = subprocess.Popen([sys.executable, "-m", "quatom", *words], cwd=tmp_path)
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health")
            for url, body in requests_of(section):
                assert answer(url.replace("8000", str(port)), body)["choices"][0]
        finally:
            server.terminate()
            assert server.wait(timeout=60) == 0


def requests_of(text):
    """Address and JSON body of every curl command."""
    found = re.findall(r"curl (\S+) .*?-d '(.*?)'\n", text, re.DOTALL)
    assert found
    return found


def answer(url, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def wait_for(server, url):
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None
        assert time.monotonic() < deadline
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
