"""Whether this process has a GPU for itself: some tests compare the memory of the whole GPU."""

import os
import shutil
import subprocess

import torch

OWN_BYTES = 2**30
"""More than the driver keeps for one process besides what torch holds (0.6 GiB on an H200)."""


def why_shared() -> str | None:
    """Who else takes memory of the current GPU, or None."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        return f"pytest-xdist runs {workers} processes on it: run this test without -n"
    processes = _count_processes()
    if processes > 1:
        return f"nvidia-smi lists {processes} processes on it"
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if others > OWN_BYTES:
        return f"{others / 2**30:.2f} GiB in use are not this process's"
    return None


def _count_processes() -> int:
    """As nvidia-smi lists them; 0 where it is missing or does not see processes (in containers)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = ["--query-compute-apps=pid", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    listed = subprocess.run([tool, *query], capture_output=True, text=True, check=False)
    return sum(line.strip().isdigit() for line in listed.stdout.splitlines())
