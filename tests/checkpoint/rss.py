"""Peak memory of a piece of code, in a process of its own."""

import subprocess
import sys

_REPORT = """
with open("/proc/self/status") as status:
    for line in status:
        if line.startswith("VmHWM"):
            print("peak", int(line.split()[1]) * 1024)
"""


def peak_rss_bytes(code: str, *arguments: str) -> int:
    """Run Python code (its sys.argv[1:] are `arguments`) and return its peak resident bytes."""
    done = subprocess.run(
        [sys.executable, "-c", code + _REPORT, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("peak ")[2])
