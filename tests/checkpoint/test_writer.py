"""The writer: complete or absent, the same bytes each time, and nothing lost on the way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quatom.checkpoint import writer as writer_module
from quatom.checkpoint.reader import open_source
from quatom.checkpoint.safetensors_file import read_header, read_tensor
from quatom.checkpoint.schema import checkpoint_tensors
from quatom.checkpoint.writer import CheckpointWriter
from quatom.errors import CheckpointError
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.checkpoint.models import CONFIG, random_tensor, write_model

ATOM = PRESETS["atom-w4a4kv4"]


@pytest.fixture
def source(tmp_path):
    folder = write_model(tmp_path / "source", dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return open_source(folder)


def planned(source, recipe=ATOM):
    return plan(source.model_config, recipe)


def block(source, recipe, index):
    specs = checkpoint_tensors(planned(source, recipe))
    return {
        name: random_tensor(name, spec, source.dtype("model.norm.weight"))
        for name, spec in specs.items()
        if name.startswith(f"model.layers.{index}.")
    }


def write(target, source, recipe=ATOM, **options):
    """A run as the pipeline makes it: each block needs the state behind the one before."""
    writer = CheckpointWriter(target, source, planned(source, recipe), **options)
    try:
        for index in range(writer.completed_blocks(), source.model_config.num_layers):
            before = writer.load_state(f"after-{index - 1}")["sum"] if index else torch.zeros(1)
            writer.save_state(f"after-{index}", {"sum": before + index + 1})
            writer.write_block(index, block(source, recipe, index))
            writer.drop_state(f"after-{index - 1}")
        writer.finish({"report.json": {"blocks": source.model_config.num_layers}})
    finally:
        writer.close()


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_read(tmp_path, source, preset):
    recipe = PRESETS[preset]
    target = tmp_path / "target"
    write(target, source, recipe)
    checkpoint = open_source(target)
    assert checkpoint.recipe == recipe
    assert checkpoint.model_config == source.model_config
    for index in range(2):
        for name, tensor in block(source, recipe, index).items():
            assert torch.equal(checkpoint.load(name), tensor)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.load(name), source.load(name))
        assert checkpoint.dtype(name) == torch.bfloat16


def test_the_files_of_a_checkpoint(tmp_path, source):
    target = tmp_path / "target"
    write(target, source)
    assert sorted(contents(target)) == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "report.json",
        "tokenizer.json",
    ]
    config = json.loads((target / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config.pop("attn_implementation") == "quatom"
    assert config == source.config_dict
    assert quantization == {
        "quant_method": "quatom",
        "recipe": ATOM.to_dict(),
        "modules_to_not_convert": ["lm_head"],
    }
    index = json.loads((target / "model.safetensors.index.json").read_text())
    expected = checkpoint_tensors(planned(source))
    assert index["weight_map"].keys() == expected.keys()
    sizes = [checkpoint_bytes(source, spec) for spec in expected.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert not (tmp_path / "target.partial").exists()


def checkpoint_bytes(source, spec):
    return spec.bits(source.dtype("model.norm.weight")) // 8


def test_the_same_run_gives_the_same_bytes(tmp_path, source):
    write(tmp_path / "one", source)
    write(tmp_path / "two", replace(source, config_dict=dict(reversed(source.config_dict.items()))))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def calls_until_killed(monkeypatch, after: int) -> list[int]:
    """Every call that changes the disk counts; the process ends before number `after`."""
    count = [0]

    def counted(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > after:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(writer_module, "write_tokenizer", counted(writer_module.write_tokenizer))
    return count


def test_killed_at_every_step_and_resumed_gives_the_same_bytes(tmp_path, source, monkeypatch):
    write(tmp_path / "whole", source)
    want = contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        count = calls_until_killed(patch, 10**6)
        write(tmp_path / "counted", source)
    steps = count[0]
    assert steps > 30
    for step in range(steps):
        target = tmp_path / f"target-{step}"
        with monkeypatch.context() as patch:
            calls_until_killed(patch, step)
            with pytest.raises(Killed):
                write(target, source)
        if target.exists():
            assert contents(target) == want  # never half there
        write(target, source, resume=True)
        assert contents(target) == want
        assert not target.with_name(target.name + ".partial").exists()


def test_killed_again_and_again(tmp_path, source, monkeypatch):
    write(tmp_path / "whole", source)
    target = tmp_path / "target"
    attempts = 0
    while not target.exists():
        attempts += 1
        with monkeypatch.context() as patch:
            calls_until_killed(patch, 3 * attempts)  # a run that never gets further never ends
            try:
                write(target, source, resume=True)
            except Killed:
                continue
    assert attempts > 3
    assert contents(target) == contents(tmp_path / "whole")


def test_a_real_kill_leaves_no_target_and_can_be_resumed(tmp_path, source):
    code = """
import os, signal, sys
from pathlib import Path
from quatom.checkpoint.reader import open_source
from tests.checkpoint.test_writer import write

replace, count = os.replace, 0

def kill_at_the_fourth(*names):
    global count
    count += 1
    if count == 4:  # the second block's state is written, its shard is not
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = kill_at_the_fourth
write(Path(sys.argv[2]), open_source(sys.argv[1]))
"""
    target = tmp_path / "target"
    command = [sys.executable, "-c", code, str(source.folder), str(target)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    writer = CheckpointWriter(target, source, planned(source), resume=True)
    assert writer.completed_blocks() == 1
    writer.close()
    write(target, source, resume=True)
    write(tmp_path / "whole", source)
    assert contents(target) == contents(tmp_path / "whole")


def test_states_survive_and_are_dropped(tmp_path, source):
    writer = CheckpointWriter(tmp_path / "target", source, planned(source))
    hidden = {"hidden": torch.randn(3, 4).bfloat16(), "mask": torch.ones(3, dtype=torch.bool)}
    writer.save_state("after-0", hidden)
    writer.close()
    writer = CheckpointWriter(tmp_path / "target", source, planned(source), resume=True)
    loaded = writer.load_state("after-0")
    assert loaded.keys() == hidden.keys()
    assert all(torch.equal(loaded[key], hidden[key]) for key in hidden)
    writer.drop_state("after-0")
    writer.drop_state("after-0")
    with pytest.raises(CheckpointError, match=r"cannot read .*after-0.safetensors: No such file"):
        writer.load_state("after-0")


def test_an_existing_target_is_never_touched(tmp_path, source):
    target = tmp_path / "target"
    target.mkdir()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"target exists; choose another target"):
            write(target, source, resume=resume)
    assert list(target.iterdir()) == []
    target.rmdir()
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"target exists"):
        write(target, source)


def test_an_interrupted_run_is_not_overwritten(tmp_path, source):
    CheckpointWriter(tmp_path / "target", source, planned(source)).close()
    with pytest.raises(CheckpointError, match=r"target.partial holds an interrupted run; .*resume"):
        write(tmp_path / "target", source)


def test_two_processes_do_not_write_the_same_target(tmp_path, source):
    writer = CheckpointWriter(tmp_path / "target", source, planned(source))
    with pytest.raises(CheckpointError, match=r"is being written by another process"):
        write(tmp_path / "target", source, resume=True)
    writer.close()
    write(tmp_path / "target", source, resume=True)


def test_resuming_with_other_inputs_is_refused(tmp_path, source):
    target = tmp_path / "target"
    options = dict(calibration_hash="a", options={"device": "cpu"})
    CheckpointWriter(target, source, planned(source), **options).close()
    other_recipe = replace(ATOM, weights=replace(ATOM.weights, clip_ratio=0.9))
    write_model(tmp_path / "other", CONFIG | {"rope_theta": 5.0}, dtype=torch.bfloat16)
    other_source = open_source(tmp_path / "other")
    changes = {
        r"another recipe \(recipe.weights.clip_ratio = 0.85; now 0.9\)": (source, other_recipe, {}),
        r"another source": (other_source, ATOM, {}),
        r"another calibration \(calibration = 'a'; now 'b'\)": (
            source,
            ATOM,
            dict(calibration_hash="b"),
        ),
        r"another options \(options.device = 'cpu'; now 'cuda'\)": (
            source,
            ATOM,
            dict(options={"device": "cuda"}),
        ),
    }
    for message, (model, recipe, change) in changes.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            CheckpointWriter(
                target, model, planned(model, recipe), **(options | change), resume=True
            )
        assert "\n" not in str(caught.value)
    write(target, source, **options, resume=True)


def test_a_full_disk_keeps_what_is_there(tmp_path, source, monkeypatch):
    target = tmp_path / "target"
    fsync, calls = os.fsync, [0]

    def full(descriptor):
        calls[0] += 1
        if calls[0] > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"target.partial is full: [\d,]+ more bytes .* --resume"
        ) as caught:
            write(target, source)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    write(target, source, resume=True)
    write(tmp_path / "whole", source)
    assert contents(target) == contents(tmp_path / "whole")


def test_too_little_room_is_noticed_at_the_start(tmp_path, source, monkeypatch):
    total = sum(
        checkpoint_bytes(source, spec) for spec in checkpoint_tensors(planned(source)).values()
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=total - 1))
    with pytest.raises(CheckpointError, match=rf"needs {total:,} more bytes, .* {total - 1:,}"):
        CheckpointWriter(tmp_path / "target", source, planned(source))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=total))
    CheckpointWriter(tmp_path / "target", source, planned(source), resume=True).close()


def test_a_place_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory"):
        CheckpointWriter(tmp_path / "file" / "target", source, planned(source))


def test_blocks_are_checked_before_they_are_written(tmp_path, source):
    writer = CheckpointWriter(tmp_path / "target", source, planned(source))
    good = block(source, ATOM, 0)
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    bad = {
        r"must have 36 tensors, got 35; differing: \['.*weight_scale'\]": {
            name: tensor for name, tensor in good.items() if name != scale
        },
        r"weight_scale is \(160, 1\) torch.float16, the checkpoint needs \(80, 1\)": good
        | {scale: torch.ones(160, 1).half()},
        r"weight_scale is \(80, 1\) torch.float32": good | {scale: torch.ones(80, 1)},
        r"weight_scale holds 80 NaN or infinite": good
        | {scale: torch.full((80, 1), 70000.0).half()},
    }
    for message, tensors in bad.items():
        with pytest.raises(CheckpointError, match=message):
            writer.write_block(0, tensors)
    assert writer.completed_blocks() == 0
    with pytest.raises(CheckpointError, match=r"has 0 of 2 blocks"):
        writer.finish()


def test_norms_of_a_float32_computation_are_stored_as_in_the_source(tmp_path, source):
    norm = "model.layers.0.input_layernorm.weight"
    exact = block(source, ATOM, 0)[norm]
    writer = CheckpointWriter(tmp_path / "target", source, planned(source))
    writer.write_block(0, block(source, ATOM, 0) | {norm: exact.float()})
    stored = read_header(tmp_path / "target.partial/checkpoint/model-00002-of-00003.safetensors")
    assert torch.equal(read_tensor(stored[norm]), exact)
    writer.close()


def test_what_cannot_be_quantized(tmp_path, source):
    write(tmp_path / "target", source)
    made = open_source(tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"is already quantized \(atom-w4a4kv4\)"):
        CheckpointWriter(tmp_path / "again", made, planned(made))
    assert not (tmp_path / "again.partial").exists()
