"""README and docs say what the repository holds: generated tables, the map, working links."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(ROOT / "scripts" / "update_tables.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page, tables):
    text = page.read_text(encoding="utf-8")
    assert tables["render"](text) == text, "run python scripts/update_tables.py"


def test_a_changed_result_makes_a_table_stale(tables):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    name = next(match.group(2) for match in tables["MARK"].finditer(page))
    tampered = re.sub(rf"(<!-- table {name} -->\n)", r"\1tampered", page)
    assert tables["render"](tampered) == page


def test_the_map_in_the_readme_is_the_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Map of the package")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE))
    package = ROOT / "src" / "quatom"
    there = {p.name for p in package.iterdir() if not p.name.startswith(("__", "."))}
    assert named == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
