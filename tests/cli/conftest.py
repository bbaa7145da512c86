import pytest

from tests.checkpoint.models import write_model
from tests.cli.commands import SMALL, Shell
from tests.conftest import write_byte_tokenizer


@pytest.fixture
def shell(monkeypatch, capsys):
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory):
    """A random llama of two blocks, one file, with a byte tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("models") / "small", SMALL)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(small_dir, text_file, tmp_path_factory):
    """`small_dir` quantized with Atom's recipe."""
    from dataclasses import replace

    from quatom.presets import PRESETS
    from quatom.quantize.pipeline import quantize_checkpoint
    from quatom.recipe import CalibrationSpec

    target = tmp_path_factory.mktemp("checkpoints") / "small-q"
    spec = CalibrationSpec(num_samples=2, sequence_length=24)
    recipe = replace(PRESETS["atom-w4a4kv4"], calibration=spec)
    quantize_checkpoint(small_dir, target, recipe, calibration=text_file)
    return target
