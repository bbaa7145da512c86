"""Every message that docs/how-to/troubleshooting.md explains is one of the code's."""

import ast
import re

import pytest

from tests.doc_commands import ROOT

PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"


def messages():
    """The quoted parts of the tables' first cells."""
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [quoted for cell in rows for quoted in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def texts():
    """Every string of the package, with a mark where a value is put in."""
    found = []
    for file in (ROOT / "src" / "quatom").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("message", messages())
def test_a_message_is_in_the_code(message, texts):
    # What varies is written as ...; fastapi is an example.
    pattern = re.escape(message.replace("fastapi", "...")).replace(r"\.\.\.", ".*?")
    assert re.search(pattern, texts), f"no error of Quatom says {message!r}"
