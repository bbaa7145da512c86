"""Wheel and sdist, built and installed as a user would: the repository is not needed."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import quatom

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist, made by the build backend itself: no network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    target = tmp_path_factory.mktemp("dist")
    code = (
        "import sys; from hatchling import build; "
        "build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"
    )
    run(sys.executable, "-c", code, target, cwd=ROOT)
    return target


def test_the_wheel_holds_what_runs(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "quatom"
    expected = {
        str(path.relative_to(ROOT / "src"))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    assert "quatom/py.typed" in names
    assert any(name.endswith(".cu") for name in names)
    assert not {name for name in names if name.split("/")[0] in ("tests", "docs", "benchmarks")}


def test_the_sdist_builds_the_same_version(built):
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.name == f"quatom-{quatom.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("/LICENSE") for name in names)
    assert any(name.endswith("/src/quatom/py.typed") for name in names)


def test_the_wheel_installs_quantizes_and_generates(built, tiny_llama_dir, text_file, tmp_path):
    """A fresh environment; the packages that Quatom depends on come from this one."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--quiet", wheel)  # fmt: skip
    # Dependencies by path. Behind the wheel's own files, and .pth files of it are not read, so that
    # the checkout that is installed there stays out of sight.
    here = Path(pytest.__file__).resolve().parents[1]
    (site / "dependencies.pth").write_text(f"{here}\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = tmp_path / "venv" / "bin" / "quatom"

    def quatom_command(*words):
        return run(command, *words, cwd=tmp_path, env=environment)

    where = run(python, "-c", "import quatom; print(quatom.__file__)", env=environment)
    assert Path(where.strip()).is_relative_to(site)
    assert quatom_command("--version") == f"quatom {quatom.__version__}\n"
    assert "quantize" in quatom_command("--help")
    quatom_command(
        "quantize", tiny_llama_dir, "q", "--calibration", text_file, "--num-samples", 2,
        "--sequence-length", 24,
    )  # fmt: skip
    assert quatom_command("generate", "q", "--prompt", "Hello", "--max-tokens", 4)
