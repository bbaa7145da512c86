"""What a launch tells the driver, with a driver that writes it down."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from quatom.errors import BackendError
from quatom.ops import cuda_build
from quatom.ops.cuda_build import CudaKernel, KernelArguments, _LaunchConfig

CLUSTER, OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION


class Separate(KernelArguments):
    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("factor", ctypes.c_float),
        ("wide", ctypes.c_int64),
    )


class Struct(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_int))


@pytest.fixture
def driver(monkeypatch):
    """Launches as (grid, block, shared, stream, attributes, parameters read by `kinds`)."""
    seen = SimpleNamespace(launches=[], kinds=(), status=0)
    signature = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.POINTER(_LaunchConfig),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    )

    @signature
    def launch(config, function, parameters, extra):
        c = config.contents
        attributes = {
            c.attributes[i].id: tuple(c.attributes[i].value[:3]) for i in range(c.num_attributes)
        }
        values = tuple(kind.from_address(parameters[i]).value for i, kind in enumerate(seen.kinds))
        grid = (c.grid_x, c.grid_y, c.grid_z)
        seen.launches.append((grid, tuple(c.block), c.shared_bytes, c.stream, attributes, values))
        return seen.status

    def name(status, text):
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"

    fake = SimpleNamespace(cuLaunchKernelEx=launch, cuGetErrorName=name)
    monkeypatch.setattr(cuda_build, "_driver", lambda: fake)
    monkeypatch.setattr(cuda_build, "_current_stream", lambda device: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return seen


def make_kernel(**options):
    given = dict(threads=96, shared_bytes=1000, cluster=1, device=0)
    return CudaKernel(ctypes.c_void_p(5), "test", **{**given, **options})


def test_each_field_is_a_parameter_of_its_own(driver):
    driver.kinds = (ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64)
    kernel = make_kernel()
    kernel.launch(7, Separate(123, -4, 0.5, 2**40), overlap=False)
    kernel.launch(9, Separate(None, 1, 2.0, -1), overlap=False)
    assert driver.launches == [
        ((7, 1, 1), (96, 1, 1), 1000, 77, {}, (123, -4, 0.5, 2**40)),
        ((9, 1, 1), (96, 1, 1), 1000, 77, {}, (None, 1, 2.0, -1)),
    ]


def test_a_struct_is_one_parameter(driver):
    driver.kinds = (ctypes.c_int64,)
    make_kernel().launch(1, Struct(3, 1), overlap=False)
    assert driver.launches[0][-1] == (3 + (1 << 32),)


@pytest.mark.parametrize("cluster", [1, 4])
def test_overlap_and_clusters_are_attributes_of_the_launch(driver, cluster):
    kernel = make_kernel(cluster=cluster)
    wanted = {} if cluster == 1 else {CLUSTER: (4, 1, 1)}
    for overlap in (True, False, True):
        kernel.launch(8, Struct(), overlap=overlap)
        extra = {OVERLAP: (1, 0, 0)} if overlap else {}
        assert driver.launches[-1][4] == wanted | extra


def test_a_failed_launch_names_the_kernel_and_the_error(driver):
    driver.status = 1
    with pytest.raises(BackendError, match="launching test on 6 CTAs failed with CUDA_ERROR_INVAL"):
        make_kernel().launch(6, Struct(), overlap=True)


def test_a_kernel_of_another_device_runs_there(driver, monkeypatch):
    current = [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current[0], self.index = self.index, current[0]

        def __exit__(self, *_):
            current[0] = self.index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    make_kernel(device=3).launch(1, Struct(), overlap=False)
    assert len(driver.launches) == 1
    assert current == [0]
