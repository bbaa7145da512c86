"""Rules of the source tree that no other test would notice."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "quatom"
MODULES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(f.parent for f in (PACKAGE / "ops").glob("*/__init__.py"))

MAX_LINES = 300
LONGER = {
    "recipe.py": "every recipe field with its docstring",
    "plan.py": "the one place where layouts, names and folds are derived",
    "families/spec.py": "everything that a family can say, with its docstrings",
    "numerics/kv_pages.py": "one cache in every format, beside its own reference",
    "benchmark/attention.py": "shapes, inputs and timing of all attention kernels",
    "benchmark/kernels.py": "shapes, inputs and timing of all other kernels",
    "checkpoint/writer.py": "one crash-safe protocol, which is judged as a whole",
    "evaluation/harness_model.py": "lm-eval's whole model interface",
    "ops/attention/triton.py": "one kernel with its launch",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_there_are_operations():
    assert {f.name for f in OPS} >= {"linear", "attention", "rope_append_kv", "norm_quantize"}


@pytest.mark.parametrize("folder", OPS, ids=lambda f: f.name)
def test_every_operation_has_a_reference_a_test_and_a_page(folder):
    assert (folder / "reference.py").exists()
    tests = list((ROOT / "tests" / "ops").glob(f"test_{folder.name}*.py"))
    tests += [
        f for f in (ROOT / "tests" / "ops").glob("*.py") if f"ops.{folder.name}" in f.read_text()
    ]
    assert tests, f"no test of {folder.name}"
    pages = [f for f in (ROOT / "docs").rglob("*.md") if folder.name in f.read_text()]
    assert pages, f"no page of docs/ mentions {folder.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    missing = [] if ast.get_docstring(tree) else ["the module"]
    # What is nested in a function is nobody's interface.
    scopes = [tree]
    while scopes:
        scope = scopes.pop()
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            overload = any(
                isinstance(d, ast.Name) and d.id == "overload"
                for d in getattr(node, "decorator_list", [])
            )
            if not ast.get_docstring(node) and not overload:
                missing.append(f"{node.name} (line {node.lineno})")
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
    assert not missing, f"{name_of(path)}: no docstring of {', '.join(missing)}"


def test_modules_fit_on_a_few_screens():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    long = {name for name, lines in lengths.items() if lines > MAX_LINES}
    assert long <= LONGER.keys(), {name: lengths[name] for name in long - LONGER.keys()}


def test_exceptions_to_the_length_still_exist():
    assert all((PACKAGE / name).exists() for name in LONGER)


def test_no_module_leaves_work_for_later():
    marks = ("TODO", "FIXME", "XXX", "raise NotImplementedError")
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not found


def test_imports_point_downwards():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
