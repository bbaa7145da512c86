"""Answers of a model by request, on disk, so that an evaluation goes on where it was stopped."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from quatom.checkpoint.reader import open_source
from quatom.errors import CheckpointError
from quatom.loading import LoadedModel
from quatom.version import __version__

CACHE_FORMAT = 1


def default_cache_folder() -> Path:
    """Where answers are kept unless a folder is named."""
    root = os.environ.get("QUATOM_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "quatom") / "zeroshot"


def model_key(loaded: LoadedModel) -> str:
    """A hash that changes with whatever may change an answer but the request.

    Weights, recipe, dtype, device, backend and the version of this package.
    """
    parts = {
        "fingerprint": open_source(loaded.source).fingerprint(),
        "recipe": loaded.recipe.to_dict(),
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "backends": [loaded.backend_name, *sorted({str(b.backend) for b in loaded.model.blocks})],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RequestCache:
    """A file of JSON lines, one an answer, written as answers come.

    A run that is killed loses at most the line it was writing; the next run drops that line.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open or create the cache of the model with this `model_key`.

        Raises:
            CheckpointError: the file cannot be written, is damaged, or of another format.
        """
        self.path = folder / f"zeroshot-{key[:16]}.jsonl"
        self._answers: dict[str, Any] = {}
        header = {"format": CACHE_FORMAT, "model": key}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self._file = self.path.open("ab")
            self._file.truncate(len(whole))
        except OSError as error:
            raise CheckpointError(
                f"cannot use the evaluation cache {self.path}: {error.strerror}; give another "
                "folder with --cache"
            ) from error
        lines = whole.splitlines()
        if not lines:
            self._append(header)
            return
        try:
            if json.loads(lines[0]) != header:
                raise ValueError("it was written for another model or by another version")
            self._answers = dict(json.loads(line) for line in lines[1:])
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"the evaluation cache {self.path} is unusable ({error}): delete it"
            ) from error

    def __len__(self) -> int:
        return len(self._answers)

    @staticmethod
    def request_hash(kind: str, *parts: Any) -> str:
        """The name under which the answer to a request is kept."""
        return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]

    def get(self, request: str) -> Any:
        """The answer, or None."""
        return self._answers.get(request)

    def put(self, request: str, answer: Any) -> None:
        """Keep an answer of plain JSON types."""
        self._answers[request] = answer
        self._append([request, answer])

    def close(self) -> None:
        """Release the file; answers stay readable."""
        self._file.close()

    def _append(self, item: Any) -> None:
        self._file.write(json.dumps(item).encode() + b"\n")
        self._file.flush()
