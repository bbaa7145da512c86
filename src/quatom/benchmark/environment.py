"""Where a measurement was made: commit, software, machine, and the ceilings of its GPU."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quatom.benchmark.timing import time_graph

RESULT_FORMAT = 1
"""`format` of a result file."""
_NUMBERS = re.compile(r"\[\s+(-?[\d.]+(?:e[+-]?\d+)?(?:,\s+-?[\d.]+(?:e[+-]?\d+)?)*)\s+\]")
"""A list of numbers over several lines: a timeline's column, which reads better in one."""


def describe_environment() -> dict[str, Any]:
    """Commit, versions and hardware, as every result file stores them."""
    description: dict[str, Any] = {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        description |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return description


def measure_ceilings() -> dict[str, float]:
    """Measured limits of the current GPU: copy bandwidth and matrix rates.

    copy_tb_s counts bytes read plus bytes written of a device-to-device copy of 1 GiB, by the
    faster of the driver's copy and a copying kernel: as a node of a CUDA graph the driver's copy
    lost a fifth on an H100 (2.43 instead of 3.0 TB/s). The rates are cuBLAS on 8192 x 8192 x 8192
    random operands.
    """
    source = torch.randint(0, 255, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copies = (
        time_graph([lambda: target.copy_(source)], min_calls=2, repeats=9),
        time_graph([lambda: torch.bitwise_not(source, out=target)], min_calls=2, repeats=9),
    )
    copy_us = min(_time_eager(lambda: target.copy_(source)), *(c.median_us for c in copies))
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    bf16 = time_graph([lambda: a @ b.t()], min_calls=2, repeats=9)
    ceilings = {
        "copy_tb_s": 2 * 2**30 / copy_us / 1e6,
        "bf16_tflops": 2 * size**3 / bf16.median_us / 1e6,
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        fp8 = time_graph(
            [
                lambda: torch._scaled_mm(
                    a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            ],
            min_calls=2,
            repeats=9,
        )
        ceilings["fp8_tflops"] = 2 * size**3 / fp8.median_us / 1e6
    return {name: round(value, 2) for name, value in ceilings.items()}


def _time_eager(call: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds of one call among many in a row, outside any graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def command_line(*program: str) -> str:
    """The command as a result file names it: `program` (quatom) and this process's arguments.

    Paths are shortened to their last part: where they lie is nobody's business.
    """
    words = (Path(word).name if os.sep in word else word for word in sys.argv[1:])
    return shlex.join([*(program or ("quatom",)), *words])


def write_results(
    path: Path, command: str, environment: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Write one result file: the form that tables, plots and checks read."""
    content = {
        "format": RESULT_FORMAT,
        "command": command,
        "environment": environment,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a crash while writing keeps the results that are there.
    temporary = path.with_name(f"{path.name}.tmp")
    text = _NUMBERS.sub(
        lambda m: f"[{' '.join(m[1].split())}]", json.dumps(content, indent=1, allow_nan=False)
    )
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str | None:
    """QUATOM_COMMIT, for a copy of the tree without .git, or git's own word."""
    return os.environ.get("QUATOM_COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD")


def _driver() -> str | None:
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0] if query else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
