"""gpu_share: what tells that others use the GPU."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from tests import gpu_share

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 GiB on which only this process runs, and what changes that."""
    state = SimpleNamespace(used=5 * GIB, pids="17\n")
    done = lambda *_, **__: SimpleNamespace(stdout=state.pids)  # noqa: E731
    properties = SimpleNamespace(uuid="0")
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.setattr(gpu_share.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(subprocess, "run", done)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(4.4 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB - state.used, 100 * GIB))
    return state


def test_a_gpu_of_ones_own(gpu, monkeypatch):
    assert gpu_share.why_shared() is None
    gpu.pids = "[N/A]\n"  # a container
    assert gpu_share.why_shared() is None
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "1")
    assert gpu_share.why_shared() is None


def test_whoever_shares_it_is_named(gpu, monkeypatch):
    gpu.used = 6 * GIB
    assert gpu_share.why_shared() == "1.60 GiB in use are not this process's"
    gpu.pids = "17\n18\n"
    assert gpu_share.why_shared() == "nvidia-smi lists 2 processes on it"
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "5")
    assert "pytest-xdist runs 5 processes" in gpu_share.why_shared()
