"""Run the command line in this process and look at what a shell would see."""

import sys
from dataclasses import dataclass

import pytest

from quatom.cli.main import main
from tests.checkpoint.models import CONFIG

SMALL = CONFIG | {"vocab_size": 260, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Two blocks, hidden 128, two heads of 64; 260 tokens for the byte tokenizer."""


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str


class Shell:
    """`shell("eval", folder)` is `quatom eval folder`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Finished:
        self.monkeypatch.setattr(sys, "argv", ["quatom", *map(str, arguments)])
        self.monkeypatch.setenv("COLUMNS", "200")
        self.capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = self.capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    def fails(self, *arguments: object) -> str:
        """The one line of an error: exit status 1, no traceback."""
        done = self(*arguments)
        assert done.status == 1, done
        assert done.err.startswith("quatom: "), done.err
        assert done.err.count("\n") == 1, done.err
        return done.err
