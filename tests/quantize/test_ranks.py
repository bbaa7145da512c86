"""Several processes write the bytes of one, and fail together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quatom.quantize.lanes import LANES, Share
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.ranks import Ranks
from quatom.quantize.statistics import TOKENS_PER_BATCH
from tests.families.models import save_tiny
from tests.quantize.together import CASES, alike, run

FAMILIES = sorted({family for family, _ in CASES.values()})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def write(models, tmp_path_factory, text_file):
    """Folder of what so many processes wrote of some cases, made once."""
    folder = tmp_path_factory.mktemp("targets")

    def make(processes, names):
        target = folder / f"{processes}-{'-'.join(names)}"
        if target.exists():
            return target
        if processes == 1:
            run(models, target, text_file, *names)
            return target
        target.mkdir()
        words = [processes, models, target, text_file, *names]
        done = subprocess.run(
            [sys.executable, "-m", "tests.quantize.together", *map(str, words)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return target

    return make


FAST = ("dense", "experts")
ALL = tuple(CASES)


@pytest.mark.parametrize(
    ("processes", "names"), [(2, FAST), pytest.param(3, ALL, marks=pytest.mark.slow)]
)
def test_the_bytes_are_those_of_one_process(processes, names, write):
    together, alone = write(processes, names), write(1, names)
    for case in names:
        files = sorted(file.name for file in (alone / case).iterdir())
        assert files == sorted(file.name for file in (together / case).iterdir())
        assert "quatom_report.json" in files
        for name in files:
            same = (alone / case / name).read_bytes() == (together / case / name).read_bytes()
            assert same, (case, name)


def test_when_one_fails_all_stop_and_one_says_why(write):
    folder = write(2, FAST)
    assert (folder / "rank-1").read_text() == "QuantizationError: the planted fault"
    assert (folder / "rank-0").read_text() == (
        "OtherProcessError: process 1 of 2 failed: QuantizationError: the planted fault"
    )


def test_an_interrupted_run_goes_on_with_another_number_of_processes(write, models, text_file):
    """The run that failed above left its first block; one process ends it."""
    family, recipe = CASES["dense"]
    target, started = write(2, FAST) / "failed", []
    with alike():
        quantize_checkpoint(
            models / family,
            target,
            recipe,
            calibration=text_file,
            resume=True,
            on_start=lambda done, _: started.append(done),
        )
    assert started == [1]
    for file in (write(1, FAST) / "dense").iterdir():
        assert file.read_bytes() == (target / file.name).read_bytes(), file.name


def test_the_command_says_an_error_once(write):
    first, second = (
        (write(2, FAST) / f"command-{rank}").read_text().split(" ", 1) for rank in (0, 1)
    )
    assert first[1].startswith("quatom: ")
    assert "exists; choose another target" in first[1]
    assert first[1].count("\n") == 1
    assert first[0] != "0" != second[0]
    assert second[1] == ""


@pytest.mark.parametrize(("sequences", "length"), [(1, 8), (38, 24), (128, 2048), (500, 512)])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_lanes_are_whole_batches_and_belong_to_one_process_each(sequences, length, count):
    shares = [Share(Ranks(rank, count), sequences, length) for rank in range(count)]
    own = torch.cat([share.own for share in shares])
    assert own.sort().values.tolist() == list(range(sequences))
    found = shares[0].lanes
    assert len(found) <= LANES
    assert {len(lane) % max(1, TOKENS_PER_BATCH // length) for lane in found[:-1]} <= {0}
    assert found == shares[-1].lanes


def test_sums_are_added_lane_by_lane():
    """Not all at once: the order of the additions is what several processes have in common."""
    share, seen = Share(Ranks(), 64, 2048), []

    def measure(rows, first):
        seen.append(first)
        return {"o": torch.tensor(1e8 if first == 0 else 1.0), "absmax.o": torch.tensor(-first)}

    totals = share.sum_up(measure, lambda _: 0, torch.device("cpu"))
    assert seen == [lane.start for lane in share.lanes]
    assert len(seen) == LANES
    assert totals["o"] == 1e8  # float32 drops each 1 that comes alone; all together they count
    assert totals["absmax.o"] == 0
