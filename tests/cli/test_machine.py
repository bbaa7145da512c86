"""`quatom doctor` without a model, `quatom warmup`, defaults of devices and memory."""

import json
import logging

import pytest
import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.loading import load
from quatom.ops.backend import Backend, observe_choices
from quatom.placement import usable_device


def test_doctor_looks_at_the_machine(shell, tmp_path):
    done = shell("doctor", "--device", "cpu", "--json", tmp_path / "d.json")
    assert done.status == 0, done
    found = {f["what"]: f["found"] for f in json.loads((tmp_path / "d.json").read_text())}
    assert {"quatom", "torch", "CPU", "GPU", "NVRTC", "Triton", "extra serve"} <= found.keys()
    assert found["attention"] == "reference"
    assert found["linear"] in ("cpu", "reference")  # by the processor


def test_doctor_looks_at_overrides_whatever_layers_they_are_for(shell, tmp_path):
    override = {"layers": "20", "activations": {"format": "int8"}}
    (tmp_path / "r.json").write_text(json.dumps({"base": "w4a16", "overrides": [override]}))
    words = ("doctor", "--device", "cpu", "--recipe", tmp_path / "r.json")
    assert shell(*words, "--json", tmp_path / "d.json").status == 0
    found = {f["what"]: f["found"] for f in json.loads((tmp_path / "d.json").read_text())}
    assert found["linear"] == "reference"  # floating-point inputs
    # Where the processor has the CPU's kernel, it is named for INT8 inputs.
    assert found.get("linear, overrides[0]", "reference") in ("cpu", "reference")
    assert found["reorder_quantize, overrides[0]"] == "reference"
    assert not any("failed" in words for words in found.values())


def test_doctor_says_when_a_forced_backend_cannot_run(shell, monkeypatch):
    monkeypatch.setenv("QUATOM_BACKEND", "cublas")
    out = shell("doctor", "--device", "cpu").out
    assert "failed: " in out


def test_choices_are_observed_only_inside_the_context(small_checkpoint):
    llm = LLM(small_checkpoint, device="cpu", max_num_seqs=1, max_model_len=32)
    with observe_choices() as found:
        llm.generate([[1, 2]])
    assert found["attention"] is Backend.REFERENCE
    before = dict(found)
    llm.generate([[1, 2]])
    assert found == before


def test_warmup_runs_every_kind_of_step(shell):
    done = shell("warmup", "--random-weights", "tiny", "--layers", 1, "--device", "cpu")
    assert done.status == 0, done
    assert "ran every kind of step of tiny, 1 layers on cpu" in done.out


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert usable_device(None).type == expected


def test_an_engine_leaves_malloc_alone_unless_asked(monkeypatch, small_checkpoint):
    calls = []
    monkeypatch.setattr("quatom.engine.engine.keep_freed_pages", lambda: calls.append(1))
    loaded = load(small_checkpoint, device="cpu")
    limits = {"max_num_seqs": 1, "max_model_len": 32}
    engine = Engine(loaded, EngineConfig(**limits))
    assert calls == []
    assert LLM.from_engine(engine).recipe == loaded.recipe
    Engine(loaded, EngineConfig(**limits, keep_freed_memory=True))
    assert calls == [1]


def test_compiling_is_announced_once_and_timed(monkeypatch, tmp_path, caplog):
    from quatom.ops import cuda_build

    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda_build, "_nvrtc", lambda: None)
    monkeypatch.setattr(cuda_build, "nvrtc_version", lambda: "0.0")
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: b"cubin")
    cuda_build._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="quatom.ops"):
        for source in ("a", "b", "a"):
            assert cuda_build.compile_cubin(source, "sm_90a") == b"cubin"
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" for ")[0] for line in said] == [
        "compiling CUDA kernels",
        "compiled a CUDA kernel",
        "compiled a CUDA kernel",
    ]
    assert str(tmp_path) in said[0]
