"""Quantize in child processes that die by SIGKILL, then resume; print what became of each as JSON.

A program of its own, because it forks: the parent must not have started torch's threads.

    python -m tests.quantize.killer SOURCE TEXT WORK_FOLDER
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec, Recipe, WeightSpec

RECIPE = Recipe(
    weights=WeightSpec(rows_per_scale=2, clip_ratio=0.85),
    calibration=CalibrationSpec(num_samples=3, sequence_length=24),
)
# Calls that change what a reader of the disk finds.
STEPS = [(os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir")]


def die_at(call: int, log: Path | None) -> None:
    """From now on count the calls of STEPS; be killed just before number `call`."""
    count = 0

    def counted(function):
        def step(*arguments, **options):
            nonlocal count
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if log is not None:
                log.write_text(str(count))
            return function(*arguments, **options)

        return step

    for module, name in STEPS:
        setattr(module, name, counted(getattr(module, name)))


def child(source: str, text: str, target: Path, *, resume: bool, call: int = -1, log=None) -> int:
    """Fork and quantize; the child's process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_at(call, log)
            quantize_checkpoint(source, target, RECIPE, calibration=text, resume=resume)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(status)
    return pid


def ended(pid: int) -> str:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {status}"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def main(source: str, text: str, work: str) -> None:
    folder = Path(work)
    AutoTokenizer.from_pretrained(source)  # what it imports takes longer than a whole child
    whole, log = folder / "whole", folder / "count"
    started = time.monotonic()
    assert ended(child(source, text, whole, resume=False, log=log)) == "done"
    seconds, calls = time.monotonic() - started, int(log.read_text())
    want = contents(whole)
    outcomes = []

    def judge(what: str, target: Path, ends: list[str]) -> None:
        equal = target.exists() and contents(target) == want
        left = sorted(p.name for p in folder.iterdir() if p.name.startswith(target.name + "."))
        outcomes.append({"what": what, "ends": ends, "equal": equal, "left": left})
        shutil.rmtree(target, ignore_errors=True)

    # The first, the last, those around the final rename, and a few between.
    last = range(calls - 5, calls)
    for call in sorted({0, 2, calls // 3, calls // 2, *last}):
        target = folder / f"at-{call}"
        ends = [ended(child(source, text, target, resume=False, call=call))]
        half = target.exists() and contents(target) != want
        ends.append(ended(child(source, text, target, resume=True)))
        judge(f"before call {call} of {calls}" + (", half a target" * half), target, ends)

    chance = random.Random(0)
    kills = 0
    for attempt in range(20):
        target, ends = folder / f"random-{attempt}", []
        while "done" not in ends and kills < 4:
            pid = child(source, text, target, resume=True)
            time.sleep(chance.uniform(0.05, 0.6) * seconds)
            os.kill(pid, signal.SIGKILL)
            ends.append(ended(pid))
            kills += ends[-1] == "killed"
            if ends[-1] == "done":  # too late: the machine is less busy than it was at first
                seconds *= 0.5
        if "done" not in ends:
            ends.append(ended(child(source, text, target, resume=True)))
        judge("at random moments", target, ends)
        if kills >= 4:
            break
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
