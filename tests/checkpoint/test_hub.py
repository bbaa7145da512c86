"""Hub repositories, with the hub's client replaced by a folder."""

import shutil
from fnmatch import fnmatch

import pytest

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError
from tests.checkpoint.gguf_models import write_gguf
from tests.checkpoint.models import write_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for some/model; what is asked for is copied out of it."""
    import huggingface_hub

    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()

    def download(repository, allow_patterns, ignore_patterns):
        if repository != "some/model":
            raise OSError("no route to host\nsecond line")
        local.mkdir(exist_ok=True)
        for file in (f for f in remote.rglob("*") if f.is_file()):
            name = str(file.relative_to(remote))
            if any(fnmatch(name, p) for p in allow_patterns) and not any(
                fnmatch(name, p) for p in ignore_patterns
            ):
                (local / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, local / name)
        return str(local)

    class Api:
        def list_repo_files(self, repository):
            return [str(f.relative_to(remote)) for f in remote.rglob("*") if f.is_file()]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return remote, local


def test_a_folder_of_safetensors(hub):
    remote, local = hub
    write_model(remote)
    (remote / "consolidated.safetensors").touch()
    (remote / "model-Q4_0.gguf").touch()
    assert open_source("some/model").folder == local
    assert {f.name for f in local.iterdir()} == {"config.json", "model.safetensors"}


def test_failures_are_explained_in_one_line(hub):
    with pytest.raises(CheckpointError, match=r"no/model is no local folder.*no route") as caught:
        open_source("no/model")
    assert "second line" not in str(caught.value)
    for path in ("no/model/at/all", "./model", "../model", "models/", "model"):
        with pytest.raises(CheckpointError, match=r"does not exist: give a folder, .* hub as"):
            open_source(path)


def test_the_only_gguf_file_of_a_repository(hub):
    remote, local = hub
    write_gguf(remote / "Model-Q4_0.GGUF")
    (remote / "README.md").touch()
    (remote / "mmproj.gguf").touch()
    assert open_source("some/model").gguf == local / "Model-Q4_0.GGUF"
    assert {f.name for f in local.iterdir()} == {"Model-Q4_0.GGUF"}


def test_one_of_several_gguf_files_must_be_named(hub):
    remote, local = hub
    (remote / "quants").mkdir()
    for name in ("a.gguf", "quants/b.gguf"):
        write_gguf(remote / name)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models .*name one as some/model/a.gg"):
        open_source("some/model")
    assert open_source("some/model/quants/b.gguf").gguf == local / "quants" / "b.gguf"


def test_a_repository_without_weights(hub):
    remote, _ = hub
    (remote / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        open_source("some/model")
