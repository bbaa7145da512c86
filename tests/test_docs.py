"""README and docs say what the repository holds: generated tables, commands, working links."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_WORDS = 900
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(ROOT / "scripts" / "update_tables.py"))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_tables_are_those_of_the_result_files_and_the_code(page, tables):
    text = page.read_text(encoding="utf-8")
    assert tables["render"](text) == text, "run python scripts/update_tables.py"


def test_a_changed_result_makes_a_table_stale(tables):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    name = next(match.group(2) for match in tables["MARK"].finditer(page))
    tampered = re.sub(rf"(<!-- table {name} -->\n)", r"\1tampered", page)
    assert tables["render"](tampered) == page


def test_every_generated_table_of_the_code_is_shown_somewhere(tables):
    shown = {m.group(2) for page in PAGES for m in tables["MARK"].finditer(page.read_text())}
    assert shown >= set(tables["CODE_TABLES"])


def test_the_readme_is_short(tables):
    text = tables["MARK"].sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(text.split()) < README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation_of_the_site():
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(there)


def test_no_tracked_file_names_a_place_on_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pattern = r"/(work|root|home)/[A-Za-z]|/tmp/[a-z]+/"
    found = subprocess.run(
        ["git", "grep", "-nIE", pattern, "--", "src", "benchmarks", "docs", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
