"""Quantize tiny models, alone or with other processes, and fail together.

As a program it starts the processes as torchrun does, but by forking: what they import takes longer
than what they do. Arguments: how many, folder of the models, folder to write, text, names of cases.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from quatom.cli.main import main
from quatom.errors import OtherProcessError, QuantizationError
from quatom.presets import PRESETS
from quatom.quantize import statistics, walk
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.quantize.ranks import Ranks, process_group
from quatom.recipe import CalibrationSpec, GPTQSpec, OutlierSpec, Recipe

BATCH = 48
"""Two sequences of 24 tokens; 38 sequences are 19 batches, and 10 lanes of two and a short one."""
CALIBRATION = CalibrationSpec(num_samples=38, sequence_length=24)


def small(name: str, **weights) -> Recipe:
    """A preset with groups of 32."""
    recipe = PRESETS[name]
    group = -1 if recipe.activations.group_size == -1 else 32
    return replace(
        recipe,
        weights=replace(recipe.weights, group_size=32, **weights),
        activations=replace(recipe.activations, group_size=group),
        outliers=OutlierSpec(channels=32 if recipe.outliers.channels else 0),
        calibration=CALIBRATION,
    )


CASES: dict[str, tuple[str, Recipe]] = {
    # Second moments, weighted keys of the first eight sequences, descent.
    "dense": ("llama-biased", small("quatom-w4a8kv4")),
    "awq": ("llama-biased", small("awq-w4a16")),
    "maxima": ("llama-biased", small("smoothquant-w4a4")),
    # Samples of inputs, and second moments of the float stream.
    "split": ("llama-biased", replace(small("qllm-w4a4kv4"), tuning=None)),
    "target": ("llama-biased", small("atom-w4a4kv4", rounder=GPTQSpec(float_target=1.0))),
    # Experts that see few tokens are measured on all of them in a second pass.
    "experts": ("mixtral", small("atom-w4a8kv4")),
}


@contextmanager
def alike() -> Iterator[None]:
    """Small batches and one thread, in which all processes must agree."""
    threads, batch = torch.get_num_threads(), statistics.TOKENS_PER_BATCH
    torch.set_num_threads(1)
    statistics.TOKENS_PER_BATCH = BATCH
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        statistics.TOKENS_PER_BATCH = batch


def run(models: Path, target: Path, text: Path, *names: str) -> None:
    """Quantize each case."""
    with alike():
        for name in names:
            family, recipe = CASES[name]
            quantize_checkpoint(models / family, target / name, recipe, calibration=text)


def fail_in_one(models: Path, target: Path, text: Path) -> str:
    """One process breaks in its second block: what each of them raises."""
    ranks, times = Ranks.current(), []
    whole = walk.run_block

    def broken(*arguments):
        times.append(1)
        if ranks.rank == 1 and len(times) == 2:
            raise QuantizationError("the planted fault")
        return whole(*arguments)

    walk.run_block = broken
    family, recipe = CASES["dense"]
    try:
        quantize_checkpoint(models / family, target / "failed", recipe, calibration=text)
    except (OtherProcessError, QuantizationError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def command(models: Path, target: Path, text: Path, *_: str) -> None:
    """`quatom quantize` into a folder that is there: its status, and what it says of it."""
    found = target / f"command-{os.environ['RANK']}"
    words = ("quantize", models / "mixtral", target, "--device", "cpu", "--calibration", text)
    words += ("--num-samples", 4, "--sequence-length", 32)
    sys.argv = ["quatom", *map(str, words)]
    with redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as stop:
            found.write_text(f"{stop.code} {said.getvalue()}")


def one_of_several(models: Path, target: Path, text: Path, *names: str) -> None:
    """Quantize and fail; what became of the fault is in a file with the process's rank."""
    with process_group("cpu"):
        rank = Ranks.current().rank
        run(models, target, text, *names)
        with alike():
            said = fail_in_one(models, target, text)
    (target / f"rank-{rank}").write_text(said)


if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(sys.argv[1]),
        run_id="together",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    for work in (one_of_several, command):
        elastic_launch(config, work)(*map(Path, sys.argv[2:5]), *sys.argv[5:])
