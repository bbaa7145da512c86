"""The command line itself: fast help, version, both ways to call it."""

import subprocess
import sys
from pathlib import Path

import pytest

import quatom
from quatom.quantize.walk import BlockQuantizer

HEAVY = ("torch", "transformers", "numpy", "safetensors", "matplotlib", "rich.progress")
CHECK = f"""
import runpy, sys
sys.argv = ["quatom", *sys.argv[1:]]
try:
    runpy.run_module("quatom", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    """`python -m quatom`, whose time to start is the time of its imports."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_the_installed_command_is_the_same_program():
    command = Path(sys.executable).with_name("quatom")
    if not command.exists():
        pytest.skip("quatom is not installed in this environment")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"quatom {quatom.__version__}\n"


def test_help_lists_the_commands(shell):
    out = shell("--help").out
    for command in ("quantize", "eval", "generate", "inspect"):
        assert command in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "quantize",
            "--recipe --calibration --num-samples --sequence-length --seed --device --resume",
        ),
        ("eval", "--perplexity --sequence-length --max-windows --json"),
        ("generate", "--prompt --max-tokens --temperature --chat"),
        ("inspect", "--layer --plot --json"),
    ],
)
def test_commands_have_the_promised_options(command, options, shell):
    out = shell(command, "--help").out
    for option in options.split():
        assert option in out


def press(*_, **__):
    """Ctrl-C, as the command sees it."""
    raise KeyboardInterrupt


def test_an_interrupt_from_the_keyboard_is_one_line(shell, monkeypatch):
    # Inside the command: Typer takes the exception on its way to `main`.
    monkeypatch.setattr("quatom.cli.common.read_recipe", press)
    done = shell("quantize", "x", "y")
    assert (done.status, done.err) == (130, "quatom: interrupted\n")


def test_an_interrupted_quantization_says_how_to_go_on(shell, monkeypatch, small_dir, tmp_path):
    command = ("quantize", small_dir, tmp_path / "out", "--recipe", "w8a8")
    monkeypatch.setattr("quatom.quantize.walk.BlockQuantizer.run", press)
    done = shell(*command)
    assert done.status == 130
    assert done.err == "quatom: interrupted\n"  # there is nothing to go on from
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.undo()

    def press_after_the_first(*arguments):
        yield next(run(*arguments))
        press()

    run = BlockQuantizer.run
    monkeypatch.setattr("quatom.quantize.walk.BlockQuantizer.run", press_after_the_first)
    assert shell(*command).err == (
        "quatom: kept 1 of 2 blocks; the same command with --resume goes on\nquatom: interrupted\n"
    )
    monkeypatch.undo()
    assert "Wrote" in shell(*command, "--resume").out
