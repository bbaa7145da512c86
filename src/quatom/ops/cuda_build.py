"""Compile CUDA C++ once per (source, options, architecture) with NVRTC, cache it, load it.

Users need no nvcc: NVRTC comes with torch's CUDA wheels. Sources include no header. Cubins are kept
under QUATOM_CACHE_DIR (default ~/.cache/quatom) by a hash of everything that determines them, and
modules are loaded and launched through the driver API.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from quatom.errors import BackendError
from quatom.ops.nvrtc import find_nvrtc as _nvrtc
from quatom.ops.nvrtc import nvrtc_version

_log = logging.getLogger(__name__)
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6
_MAX_DYNAMIC_SHARED_BYTES = 8
_DEFAULT_SHARED_BYTES = 48 * 1024


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    root = os.environ.get("QUATOM_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "quatom") / "cubin"


def read_source(package: str, name: str) -> str:
    """A CUDA source of a package, after the code that several of them share."""
    shared = (resources.files("quatom.ops") / "device.cuh").read_text()
    return shared + (resources.files(package) / name).read_text()


def compile_cubin(source: str, arch: str, defines: Mapping[str, int] | None = None) -> bytes:
    """The cubin of `source` for `arch` ("sm_90a"), from the cache or compiled now.

    Raises:
        BackendError: NVRTC is missing or refuses the source; the message carries its log.
    """
    options = [f"--gpu-architecture={arch}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    nvrtc = _nvrtc()
    key = "\0".join([source, *options, nvrtc_version()])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    _announce(arch)
    started = time.perf_counter()
    cubin = _compile(nvrtc, source, options)
    _log.info("compiled a CUDA kernel for %s in %.1f s", arch, time.perf_counter() - started)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may compile the same kernel: each writes its own file, the rename is atomic.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
    return cubin


@cache
def _announce(arch: str) -> None:
    """Say once per process why the program waits."""
    _log.info(
        "compiling CUDA kernels for %s, some seconds each; they are kept in %s and compiled once",
        arch,
        cache_folder(),
    )


def _compile(nvrtc: ctypes.CDLL, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        if status:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(
                f"NVRTC could not compile a kernel (error {status}, options {' '.join(options)}):\n"
                f"{log.value.decode(errors='replace')}"
            )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("grid_z", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint32),
    ]


class KernelArguments(ctypes.Structure):
    """Parameters of a kernel, a field each in its order; subclasses name them in `_fields_`.

    A kernel that takes one struct by value is launched with a plain `ctypes.Structure` instead.
    """


@cache
def _pointer_layout(kind: type[ctypes.Structure]) -> tuple[Any, tuple[int, ...]]:
    """Type of the array of pointers that a launch takes, and where they point in the arguments."""
    offsets = (0,)
    if issubclass(kind, KernelArguments):
        offsets = tuple(getattr(kind, field[0]).offset for field in kind._fields_)
    return ctypes.c_void_p * len(offsets), offsets


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"the CUDA driver library cannot be loaded: {error}") from error


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        text = name.value.decode() if name.value else "unknown error"
        raise BackendError(f"{what} failed with {text} ({status})")


@cache
def device_capability(device: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def device_name(device: int) -> str:
    """Name of a CUDA device, as its driver gives it."""
    return torch.cuda.get_device_name(device)


@cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a CUDA device."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


class CudaKernel:
    """A loaded kernel of one device, ready to launch.

    A forward pass launches hundreds of kernels, so that what does not change from one launch to the
    next is made once.
    """

    __slots__ = ("_configs", "_keep", "device", "function", "name")

    def __init__(
        self,
        function: ctypes.c_void_p,
        name: str,
        *,
        threads: int,
        shared_bytes: int,
        cluster: int,
        device: int,
    ) -> None:
        """Args say what `load_kernel`'s say; `device` is where the function was loaded."""
        self.function, self.name, self.device = function, name, device
        self._keep: list[Any] = []  # attribute arrays that the configurations point to
        self._configs = tuple(
            self._config(threads, shared_bytes, cluster, overlap) for overlap in (False, True)
        )

    def launch(self, grid: int, arguments: ctypes.Structure, *, overlap: bool) -> None:
        """Launch on torch's current stream of the kernel's device.

        Args:
            grid: CTAs, a multiple of `cluster`.
            arguments: `KernelArguments`, or the struct that the kernel takes by value.
            overlap: let the kernel start while the one before it ends (programmatic dependent
                launch); it must execute griddepcontrol.wait before it reads that one's results.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.launch(grid, arguments, overlap=overlap)
            return
        config = _LaunchConfig.from_buffer_copy(self._configs[overlap])
        config.grid_x = grid
        config.stream = _current_stream(self.device)
        array, offsets = _pointer_layout(type(arguments))
        base = ctypes.addressof(arguments)
        pointers = array(*[base + offset for offset in offsets])
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None)
        if status:
            _check(status, f"launching {self.name} on {grid} CTAs")

    def _config(
        self, threads: int, shared_bytes: int, cluster: int, overlap: bool
    ) -> _LaunchConfig:
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = _CLUSTER_DIMENSION
            attributes[count].value[:3] = (cluster, 1, 1)
            count += 1
        if overlap:
            attributes[count].id = _PROGRAMMATIC_SERIALIZATION
            attributes[count].value[0] = 1
            count += 1
        self._keep.append(attributes)
        return _LaunchConfig(0, 1, 1, (threads, 1, 1), shared_bytes, None, attributes, count)


def _current_stream(device: int) -> int:
    """Handle of torch's current stream, without the Stream object around it."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def load_kernel(
    cubin: bytes, name: str, *, threads: int, shared_bytes: int = 0, cluster: int = 1
) -> CudaKernel:
    """Load one kernel of a cubin into the current device's context.

    Raises:
        BackendError: the driver refuses the cubin or the shared memory it needs.
    """
    torch.cuda.current_stream()  # creates torch's context, which the module is loaded into
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading {name}")
    _check(
        _driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
        f"finding {name}",
    )
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        _check(
            _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes),
            f"reserving {shared_bytes} bytes of shared memory for {name}",
        )
    return CudaKernel(
        function,
        name,
        threads=threads,
        shared_bytes=shared_bytes,
        cluster=cluster,
        device=torch.cuda.current_device(),
    )
