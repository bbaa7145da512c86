"""Models of the Hugging Face hub, downloaded: ORGANIZATION/NAME, or one GGUF file of it."""

import re
from pathlib import Path, PurePosixPath

from quatom.checkpoint.gguf_parts import models, split_parts
from quatom.errors import CheckpointError

_NAME = r"\w(?:[\w.-]*\w)?"  # the hub's rule; so ./model and ../model are folders
_ID = re.compile(rf"({_NAME}/{_NAME})(?:/([\w./-]+\.gguf))?", re.IGNORECASE)
_SETTINGS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_WEIGHTS = ("*.safetensors",)
_IGNORED = ("original/*", "onnx/*", "consolidated*")  # the same weights in other forms


def hub_name(text: str) -> tuple[str, str | None] | None:
    """Repository and file of ORGANIZATION/NAME or ORGANIZATION/NAME/FILE.gguf; else None."""
    match = _ID.fullmatch(text)
    return None if match is None else (match[1], match[2])


def download(text: str) -> Path:
    """The folder of a repository, or the GGUF file that was asked for or is the only one.

    Raises:
        CheckpointError: there is no such model, no network, or several GGUF files to choose from.
    """
    name = hub_name(text)
    assert name is not None
    repository, file = name
    if file is None:
        folder = _fetch(repository, (*_WEIGHTS, *_SETTINGS))
        if any(folder.glob("*.safetensors")):
            return folder
        file = _only_gguf(repository)
        if file is None:
            return folder
    parts = [str(PurePosixPath(file).with_name(p.name)) for p in split_parts(Path(file))]
    return _fetch(repository, (*parts, *_SETTINGS)) / file


def download_config(repository: str) -> Path:
    """A folder with the config.json of a repository, without its weights.

    Raises:
        CheckpointError: there is no such repository, or no network.
    """
    return _fetch(repository, ("config.json",))


def _only_gguf(repository: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository)
    except Exception as error:  # the hub client raises HTTP, OS and its own errors
        raise _unavailable(repository, error) from error
    found = models(map(Path, names))
    if len(found) > 1:
        shown = ", ".join(str(file) for file in found[:4])
        raise CheckpointError(
            f"{repository} holds {len(found)} GGUF models ({shown}...); name one as "
            f"{repository}/{found[0]}"
        )
    return str(found[0]) if found else None


def _fetch(repository: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
            )
        )
    except Exception as error:  # the hub client raises HTTP, OS and its own errors
        raise _unavailable(repository, error) from error


def _unavailable(repository: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0]
    return CheckpointError(
        f"{repository} is no local folder and could not be downloaded from the hub "
        f"({type(error).__name__}: {reason}); check the name and the network, or give the path of "
        "a folder"
    )
