"""Progress: on stderr, on a terminal alone, within 80 columns, and only once the work begins."""

import io
import re
from types import SimpleNamespace

import pytest
import rich.console

from quatom.cli.common import block_progress, rung_progress, window_progress

TITLE = "Quantizing to quatom-w4a8kv4, 128 x 2048 tokens"


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 80 columns gets on stderr."""
    written = io.StringIO()
    console = rich.console.Console

    def make(stderr=False):
        assert stderr
        return console(file=written, force_terminal=True, width=80, color_system=None)

    monkeypatch.setattr("rich.console.Console", make)
    return written


def shown(terminal):
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in lines.split("\n") if line.strip()]


def test_blocks(terminal):
    with block_progress(TITLE) as (on_start, on_block):
        assert shown(terminal) == []  # checks may still fail
        on_start(0, 100)
        on_block(SimpleNamespace(relative_error=0.1234, seconds=123.4, index=98, num_blocks=100))
    lines = shown(terminal)
    assert lines[0] == TITLE
    assert "99/100" in lines[-1]
    assert lines[-1].endswith("left, last: 123.4 s, output error 0.123")
    assert max(map(len, lines)) <= 80


def test_windows_and_rungs(terminal):
    with window_progress("tiny on wikitext2") as on_window:
        on_window(3, 148, 12345.678)
    with rung_progress("1 of 8: float") as on_block:
        on_block(2, 32)
    lines = shown(terminal)
    assert lines[0] == "tiny on wikitext2"
    assert any(" 3/148 " in line and line.endswith("perplexity 12345.678") for line in lines)
    assert any("2/32" in line and line.endswith("left") for line in lines)


def test_nothing_where_there_is_no_terminal(capsys):
    with block_progress(TITLE) as (on_start, on_block):
        on_start(0, 2)
        on_block(SimpleNamespace(relative_error=None, seconds=1.0, index=0, num_blocks=2))
    assert capsys.readouterr() == ("", "")
