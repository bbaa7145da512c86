"""What a machine has that Quatom uses, what is missing, and which kernels run there.

The kernels are observed, not guessed: a tiny random model of a recipe runs a prompt and a decode.
"""

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from quatom.benchmark.environment import describe_environment
from quatom.benchmark.random_weights import random_model
from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.sampling import SamplingParams
from quatom.errors import BackendError, QuatomError
from quatom.extras import EXTRAS
from quatom.ops.backend import Backend, observe_choices
from quatom.ops.nvrtc import nvrtc_version
from quatom.recipe import Recipe
from quatom.version import __version__


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for."""

    what: str
    found: str
    remedy: str
    """What to do about it; empty: nothing."""


def find_software() -> list[Finding]:
    """Processor, GPU, compilers and packages."""
    machine = describe_environment()
    findings = [
        Finding("quatom", f"{__version__} in {Path(__file__).parents[1]}", ""),
        Finding("Python", sys.version.split()[0], ""),
        Finding("torch", torch.__version__, ""),
        Finding("CPU", f"{machine['cpu']}, {machine['cores']} cores", ""),
        _vnni(),
        *_gpu(machine),
        _nvrtc(),
        Finding(
            "Triton",
            machine["triton"] or "not installed",
            "" if machine["triton"] else "with a GPU: pip install 'quatom[gpu]'",
        ),
    ]
    for extra in ("serve", "eval", "sentencepiece"):
        missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        remedy = f"pip install 'quatom[{extra}]'" if missing else ""
        findings.append(Finding(f"extra {extra}", found, remedy))
    return findings


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _vnni() -> Finding:
    has = torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
    found = "yes: INT8 products" if has else "no: the reference runs, which is slower"
    return Finding("AVX-512 VNNI", found, "")


def _gpu(machine: dict[str, object]) -> list[Finding]:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return [
            Finding("GPU", f"{machine['gpu']}, {memory:.1f} GiB, sm_{major}{minor}", ""),
            Finding("driver", f"{machine['driver']}, torch uses CUDA {machine['cuda']}", ""),
        ]
    if torch.version.cuda is None:
        return [
            Finding(
                "GPU",
                "none: this torch is a CPU build",
                "with a GPU: install a CUDA build of torch",
            )
        ]
    return [Finding("GPU", "none that torch sees", "with a GPU: install the NVIDIA driver")]


def _nvrtc() -> Finding:
    try:
        return Finding("NVRTC", nvrtc_version(), "")
    except BackendError:
        return Finding("NVRTC", "not found", "with a Hopper GPU: pip install 'quatom[gpu]'")


def find_kernels(recipe: Recipe, device: torch.device) -> list[Finding]:
    """The backend of every operation under a recipe, and the reason.

    Of overrides those operations that run on another backend there.
    """
    plain, *others = recipe.variants
    found = _kernels_of(plain, device)
    for number, own in enumerate(others):
        more = [one for one in _kernels_of(own, device) if one not in found]
        found += [replace(one, what=f"{one.what}, overrides[{number}]") for one in more]
    return found


def _kernels_of(recipe: Recipe, device: torch.device) -> list[Finding]:
    with observe_choices() as chosen:
        try:
            loaded = random_model("tiny", recipe, device=device)
            limits = EngineConfig(max_num_seqs=2, max_model_len=64, cuda_graphs=False)
            engine = Engine(loaded, limits)
            engine.add_request("doctor", [1, 2, 3], SamplingParams(max_tokens=3, detokenize=False))
            while engine.has_work:
                engine.step()
        except QuatomError as error:
            return [Finding("a tiny model", f"failed: {error}", "report this with this output")]
    return [Finding(op, backend.value, _why(backend, device)) for op, backend in chosen.items()]


def _why(backend: Backend, device: torch.device) -> str:
    if device.type == "cpu":
        if backend is Backend.CPU:
            return "the processor has AVX-512 VNNI"
        return "the only implementation for a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    match backend:
        case Backend.CUDA:
            return f"there is a CUDA kernel for sm_{major}{minor}"
        case Backend.CUBLAS:
            return "the recipe is one product of cuBLAS"
        case Backend.TRITON:
            return f"no CUDA kernel for these formats on sm_{major}{minor}"
        case _:
            return "no kernel for these formats"
