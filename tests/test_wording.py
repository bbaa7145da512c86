"""Words that readers stumbled over: not in pages, comments, docstrings, errors or help texts."""

import io
import re
import tokenize

import pytest

from tests.doc_commands import ROOT

COUNTED = "scales?|bytes|bits|channels|numbers?|once|rows|samples|blocks"
UNITS = "row|token|channel|head|block|group|step|weight|activation|sequence|second|layer|shape|slot"
WORDS = {
    "use 'after' or 'of'": r"(?<!falls )(?<!fall )(?<!lags )\bbehind\b",
    "name the bound": r"\bfrom which on\b",
    "say what is needed or asked for": r"\bwanted\b",
    "use 'is', 'lies' or 'comes'": r"\b(?:stands?|stood)\b(?! for\b|\*\*)",
    "use 'per'": rf"\b(?:{COUNTED}) an? (?:{UNITS})\b",
}  # fmt: skip


def pages():
    """README and the pages that say what holds today; lab notes keep their words."""
    docs = (p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "lab")
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(docs)]


def sources():
    folders = ("src", "examples", "scripts")
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def prose(file):
    """(line, text) of the comments and strings of a module, of all lines of a page."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                text = re.sub(r"\{[^{}]*\}", "", token.string)
                # The name of an argument in a docstring is a name.
                yield token.start[0], re.sub(r"^ *\w+: ", "", text, flags=re.MULTILINE)
    elif file.suffix in (".cu", ".cuh"):
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.partition("//")[2]
    else:
        yield from enumerate(re.sub(r"`[^`\n]*`", "``", text).splitlines(), 1)


def stumbles(file):
    for line, text in prose(file):
        for remedy, pattern in WORDS.items():
            for found in re.findall(pattern, text):
                yield f"{file.name}:{line}: {found!r}: {remedy}"


@pytest.mark.parametrize("file", pages(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_page_can_be_read_once(file):
    assert list(stumbles(file)) == []


def test_comments_and_strings_of_the_code_can_be_read_once():
    kernels = [f for end in ("cu", "cuh") for f in (ROOT / "src").rglob(f"*.{end}")]
    assert [found for file in (*sources(), *kernels) for found in stumbles(file)] == []


def test_each_word_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    for text in (
        "the block behind it", "tokens from which on", "what is wanted", "it stands there",
        "two scales a row", "4 bits a weight",
    ):  # fmt: skip
        page.write_text(text, encoding="utf-8")
        assert len(list(stumbles(page))) == 1, text
    page.write_text("a task that falls behind; X stands for Y; 2 bits per weight", encoding="utf-8")
    assert list(stumbles(page)) == []
