"""The file of a batch's answers: how more are added without losing any of them.

Nothing is changed before the whole file is known to be answers of batches. Then a last line that a
killed run left unfinished is cut off, and answers that are to be made again are left out: the file
without them is written beside it and takes its place in one step.
"""

import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from quatom.checkpoint.safetensors_file import fsync
from quatom.errors import RequestError
from quatom.serving.batch_answers import Output, read_output
from quatom.serving.batch_file import BadLine, BatchLine


def check_output(source: Path, target: Path, lines: Sequence[BatchLine | BadLine]) -> Output:
    """Look at an output file, which need not exist; nothing is changed.

    Args:
        source: the batch file.
        target: where its answers go.
        lines: what `source` holds.

    Raises:
        RequestError: `target` is `source`, is no regular file, cannot be written, or holds anything
            but answers.
    """
    folder = Path(os.path.realpath(target)).parent
    if not target.exists():
        if not folder.is_dir():
            raise RequestError(f"cannot write {target}: there is no folder {folder}; create it")
        if not os.access(folder, os.W_OK):
            raise RequestError(f"cannot write {target}: no permission to write in {folder}")
        return read_output(b"", target, lines)
    if not stat.S_ISREG(target.stat().st_mode):
        raise RequestError(f"{target} is no regular file: give another output file")
    if os.path.samefile(source, target):
        raise RequestError(f"{target} is the batch file itself: give another output file")
    if not os.access(target, os.R_OK | os.W_OK):
        raise RequestError(f"cannot read and write {target}: no permission")
    output = read_output(target.read_bytes(), target, lines)
    if output.outdated and not os.access(folder, os.W_OK):
        raise RequestError(
            f"{target} holds failed answers, and a file without them cannot be written beside it: "
            f"no permission to write in {folder}"
        )
    return output


@contextmanager
def open_output(
    target: Path, lines: Sequence[BatchLine | BadLine]
) -> Iterator[tuple[Output, "AnswerFile"]]:
    """Clean up an output file and open it to append answers.

    Raises:
        RequestError: it holds anything but answers, or another run writes to it.
    """
    with target.open("a+b", buffering=0) as file:
        _lock(file, target)
        file.seek(0)
        content = file.read()
        output = read_output(content, target, lines)
        if output.outdated:
            with _replaced(target, output.kept) as made:
                yield output, AnswerFile(made)
            return
        answers = AnswerFile(file)
        if len(output.kept) < len(content):
            file.truncate(len(output.kept))
        answers.write(output.kept[len(content) :])  # the end of the last line, if that is missing
        yield output, answers


class AnswerFile:
    """Appends lines, each whole or not at all while this process lives."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def add(self, answer: dict[str, Any]) -> None:
        """Append an answer.

        Raises:
            RequestError: the disk is full, or failed; the file is as it was before.
        """
        self.write(json.dumps(answer).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Append bytes; see `add`."""
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(before)
            raise RequestError(
                f"cannot write {self._file.name}: {error.strerror}; the answers so far are kept, "
                "so make room and run the batch again"
            ) from error

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())


def _lock(file: FileIO, target: Path) -> None:
    with suppress(OSError):  # some network file systems have no locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"another run-batch is writing to {target}") from error


@contextmanager
def _replaced(target: Path, content: bytes) -> Iterator[FileIO]:
    """A new file of this content in the place of `target`, open to append."""
    path = Path(os.path.realpath(target))
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with beside.open("ab", buffering=0) as made:
        try:
            AnswerFile(made).write(content)
            os.fsync(made.fileno())
            shutil.copymode(path, beside)
            _lock(made, target)
            os.replace(beside, path)
            fsync(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        yield made
