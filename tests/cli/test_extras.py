"""What runs without the packages of the extras, and what is said where one is missing."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quatom.extras import EXTRAS, how_to_install

ROOT = Path(__file__).resolve().parents[2]
WITH_OTHERS = {"google", "httpx", "pydantic", "yaml"}
"""Installed by typer or by the hub's client, which the package itself needs."""
OPTIONAL = {name.split(".")[0] for names in EXTRAS.values() for name in names} - WITH_OTHERS
RUN = """
import sys
from quatom.cli.main import main
for line, hidden in {lines!r}:
    sys.modules.update(dict.fromkeys(hidden))  # None: neither found nor imported
    sys.argv = ["quatom", *line]
    try:
        main()
    except SystemExit as stop:
        print(f"status {{stop.code or 0}}", file=sys.stderr)
    for name in hidden:
        sys.modules.pop(name, None)
"""


def run(*lines):
    """Run command lines in one process, each without the packages beside it; stdout and errors."""
    words = [([str(word) for word in line], sorted(hidden)) for line, hidden in lines]
    code = RUN.format(lines=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.splitlines()


def test_the_list_is_that_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"pyyaml": "yaml", "pyzmq": "zmq", "protobuf": "google.protobuf"}
    for extra, modules in EXTRAS.items():
        found = [re.match(r"[\w-]+", line)[0] for line in extras["optional-dependencies"][extra]]
        found = [n for n in found if not n.startswith("nvidia-")]  # a library, not imported
        assert sorted(modules) == sorted(names.get(n, n.replace("-", "_")) for n in found)


@pytest.fixture(scope="module")
def ran(small_dir, text_file, tmp_path_factory):
    """All lines below in one process, which imports what they need once."""
    folder = tmp_path_factory.mktemp("extras")
    plain, missing = plain_lines(small_dir, text_file, folder), missing_lines(small_dir, folder)
    lines = [(line, OPTIONAL) for line in plain]
    lines += [(line, {package}) for line, (_, package) in missing.items()]
    out, errors = run(*lines)
    return folder, out, errors[: len(plain)], errors[len(plain) :]


def plain_lines(small_dir, text_file, folder):
    target, text = folder / "q", ("--sequence-length", 24)
    return (
        ("quantize", small_dir, target, "--calibration", text_file, "--num-samples", 2, *text),
        ("eval", target, "--perplexity", text_file, "--max-windows", 1, *text),
        ("generate", target, "--prompt", "Hello", "--max-tokens", 2),
        ("inspect", target),
        ("report", target, "--gpu", "H200", "--html", folder / "report.html"),
        ("plan", target, "--gpu", "H200"),
        ("doctor", "--device", "cpu", "--json", folder / "doctor.json"),
    )


def test_a_plain_installation_quantizes_measures_and_generates(ran):
    folder, out, said, _ = ran
    assert said == ["status 0"] * 7
    found = {f["what"]: f for f in json.loads((folder / "doctor.json").read_text())}
    assert found["extra serve"]["remedy"] == "pip install 'quatom[serve]'"
    assert "'quatom[serve]'" in out


def missing_lines(small_dir, folder):
    source, target, config = (folder / name for name in ("in.jsonl", "out.jsonl", "serve.yaml"))
    source.write_text('{"custom_id": "a"}\n')
    config.write_text("port: 8000\n")
    return {
        ("serve", small_dir): ("serve", "fastapi"),
        ("serve", small_dir, "--port", 0): ("serve", "zmq"),
        ("run-batch", source, target, "--model", small_dir): ("serve", "fastapi"),
        ("serve", "--config", config): ("serve", "yaml"),
        ("eval", small_dir, "--tasks", "piqa"): ("eval", "lm_eval"),
        ("eval", small_dir, "--perplexity", "wikitext2"): ("eval", "datasets"),
    }


def test_a_missing_package_is_one_line_before_the_work(ran, small_dir):
    folder, _, _, errors = ran
    lines = missing_lines(small_dir, folder)
    assert errors[1::2] == ["status 1"] * len(lines)
    for said, (extra, _) in zip(errors[::2], lines.values(), strict=True):
        assert said.startswith("quatom: ")
        assert f"pip install 'quatom[{extra}]'" in said
    assert not (folder / "out.jsonl").exists()


def test_a_package_of_no_extra_is_a_bug_that_is_shown():
    assert how_to_install("torch") is None
    assert how_to_install(None) is None
