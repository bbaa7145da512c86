import pytest

from tests.cli.commands import Shell


@pytest.fixture
def shell(monkeypatch, capsys):
    return Shell(monkeypatch, capsys)
