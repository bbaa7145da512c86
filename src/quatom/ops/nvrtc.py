"""Find NVRTC, NVIDIA's compiler library for CUDA C++."""

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from quatom.errors import BackendError


def nvrtc_version() -> str:
    """Major and minor version of NVRTC.

    Raises:
        BackendError: it was not found.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    find_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def find_nvrtc() -> ctypes.CDLL:
    """The NVRTC library: the one torch depends on, else one on the loader's path.

    Raises:
        BackendError: there is none.
    """
    tried = []
    for candidate in (*_installed_nvrtc(), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            if isinstance(candidate, Path):
                # NVRTC opens its builtins by bare name: it finds them once they are loaded.
                for builtins in candidate.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(candidate))
        except OSError as error:
            tried.append(str(error))
    raise BackendError(
        "NVRTC, which compiles the CUDA kernels, was not found; `pip install nvidia-cuda-nvrtc`, "
        f"or set QUATOM_BACKEND=triton. Tried: {'; '.join(tried)}"
    )


def _installed_nvrtc() -> list[Path]:
    found = []
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12"):
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            continue
        for file in listed:
            if file.name.startswith("libnvrtc.so"):
                found.append(Path(str(file.locate())))
    return found
