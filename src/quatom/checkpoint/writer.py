"""A Quatom checkpoint written block by block, so that nothing is lost and nothing is half there.

    TARGET.partial/checkpoint/   grows shard by shard; renamed to TARGET at the end
    TARGET.partial/state/        what the run needs to go on: its fingerprint, hidden states

Every file is written under another name, synced and renamed: after kill -9 at any moment each file
is either complete or absent, and a resumed run writes the same bytes as an uninterrupted one.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from quatom.checkpoint.reader import TensorSource, open_source
from quatom.checkpoint.safetensors_file import (
    fsync,
    read_header,
    read_tensor,
    write_tensors,
)
from quatom.checkpoint.schema import checkpoint_tensors, layer_tensors, outer_tensors
from quatom.checkpoint.tokenizer import write_tokenizer
from quatom.checkpoint.validation import check_finite, read_json
from quatom.errors import CheckpointError
from quatom.plan import ModelPlan

_LONGEST_NAME = 255 - len(".partial")  # of Linux file systems, for the working folder beside it
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """Writes one checkpoint.

    Order of calls for a resumable run::

        writer = CheckpointWriter(target, source, plan(config, recipe), resume=True)
        for index in range(writer.completed_blocks(), num_layers):
            ...  # state = writer.load_state(f"after-{index - 1}") where index > 0
            writer.save_state(f"after-{index}", state)
            writer.write_block(index, tensors)
            writer.drop_state(f"after-{index - 1}")
        writer.finish()

    The state is saved before its block: a block that is there always has its state.
    """

    def __init__(
        self,
        target: str | Path,
        source: TensorSource,
        resolved: ModelPlan,
        *,
        calibration_hash: str | None = None,
        options: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Prepare the working folder, or take up an interrupted one.

        Args:
            target: folder to write; must not exist.
            source: the model that is quantized.
            resolved: how.
            calibration_hash: hash of the calibration tokens; None without calibration.
            options: JSON values of everything else that changes the bytes (device, dtype...).
            resume: continue an interrupted run if there is one.

        Raises:
            CheckpointError: the target exists, an interrupted run is in the way or does not match
                this one, another process writes it, or the disk has too little room.
        """
        self.target = check_target(target, resume=resume)
        self.source = source
        self.plan = resolved
        self.work = _working_folder(self.target)
        self._folder = self.work / "checkpoint"
        self._state = self.work / "state"
        self._lock: int | None = None
        if source.recipe is not None:
            raise CheckpointError(
                f"{source.folder} is already quantized ({source.recipe.name}); quantize the "
                "floating-point model"
            )
        specs = checkpoint_tensors(resolved)
        self._tensors = {
            name: (spec.shape, spec.dtype or source.dtype(name)) for name, spec in specs.items()
        }
        self._as_in_source = {name for name, spec in specs.items() if spec.dtype is None}
        fingerprint = {
            "recipe": resolved.recipe.to_dict(),
            "source": source.fingerprint(),
            "calibration": calibration_hash,
            "options": dict(options or {}),
        }
        self._finished = self._renamed_before_a_crash(fingerprint) if resume else False
        if self._finished:
            self._clean_up()
            return
        _check_absent(self.target)
        try:
            self._start(fingerprint)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """As `close`; after an error nothing is left where no block was finished."""
        if kind is not None and not self.completed_blocks():
            shutil.rmtree(self.work, ignore_errors=True)
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the target is there: from the start, if a crash followed the last rename."""
        return self._finished

    def completed_blocks(self) -> int:
        """Leading decoder blocks that are on disk."""
        if self._finished:
            return self.source.model_config.num_layers
        index = 0
        while index < self.source.model_config.num_layers and self._shard(index).exists():
            index += 1
        return index

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of decoder block `index`, by full name, as one shard.

        Norms and biases may come in the dtype of the computation; they are stored in the source's.

        Raises:
            CheckpointError: a name, shape or dtype is not the schema's, a tensor holds NaN or
                infinity, or the disk is full.
        """
        expected = self._block_tensors(index)
        if tensors.keys() != expected.keys():
            difference = sorted(tensors.keys() ^ expected.keys())
            raise CheckpointError(
                f"block {index} must have {len(expected)} tensors, got {len(tensors)}; "
                f"differing: {difference}"
            )
        tensors = {
            name: tensor.to(expected[name][1]) if name in self._as_in_source else tensor
            for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            if (tuple(tensor.shape), tensor.dtype) != expected[name]:
                raise CheckpointError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the checkpoint needs "
                    f"{expected[name][0]} {expected[name][1]}"
                )
            check_finite(self._shard(index), name, tensor)
        self._write_shard(self._shard(index), expected, tensors.__getitem__)

    def save_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for a resumed run, under a name; `finish` removes them.

        Raises:
            CheckpointError: the disk is full.
        """
        specs = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
        self._write_shard(self._state_file(name), specs, tensors.__getitem__)

    def load_state(self, name: str) -> dict[str, Tensor]:
        """What `save_state` kept.

        Raises:
            CheckpointError: there is no such state.
        """
        header = read_header(self._state_file(name))
        return {key: read_tensor(stored) for key, stored in header.items()}

    def has_state(self, name: str) -> bool:
        """Whether `load_state` would find it."""
        return self._state_file(name).exists()

    def drop_state(self, name: str) -> None:
        """Remove a state that is no longer needed, if it is there."""
        self._state_file(name).unlink(missing_ok=True)

    def finish(self, documents: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write all other tensors, index, configuration and tokenizer; rename to the target.

        Args:
            documents: further JSON files of the checkpoint, by file name.

        Raises:
            CheckpointError: a block is missing or the disk is full.
        """
        if self._finished:
            return self.target
        config = self.source.model_config
        if (done := self.completed_blocks()) < config.num_layers:
            raise CheckpointError(f"{self.work} has {done} of {config.num_layers} blocks")
        rest = {n: self._tensors[n] for n in outer_tensors(config)}
        if not self._shard(-1).exists():
            self._write_shard(self._shard(-1), rest, self.source.load)
        shards = {name: self._shard(-1).name for name in rest}
        for index in range(config.num_layers):
            shards |= dict.fromkeys(self._block_tensors(index), self._shard(index).name)
        total = sum(_num_bytes(spec) for spec in self._tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": shards}
        self._write_json(self._folder / "model.safetensors.index.json", index_file)
        for name, document in (documents or {}).items():
            self._write_json(self._folder / name, document)
        with self._disk_errors():
            write_tokenizer(self.source, self._folder)
            for file in self._folder.rglob("*"):
                fsync(file)  # folders too: their entries must survive a power cut
        self._write_json(self._folder / "config.json", self._config())
        open_source(self._folder)  # what is renamed has been read back
        with self._disk_errors():
            fsync(self._folder)
            os.rename(self._folder, self.target)
            fsync(self.target.parent)
        self._finished = True
        self.close()
        self._clean_up()
        return self.target

    def _clean_up(self) -> None:
        """Remove the working folder, run.json last: it tells a resumed run that nothing is left."""
        for file in self._state.glob("*"):
            if file.name != "run.json":
                file.unlink()
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let another process take the working folder. `finish` and the process's end do it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _config(self) -> dict[str, Any]:
        config, recipe = self.plan.config, self.plan.recipe
        skipped = [config.head_name.removesuffix(".weight")]
        return self.source.config_dict | {
            # transformers has no such attention: from_pretrained stops where nothing has made
            # these tensors known to it, instead of making weights up.
            "attn_implementation": "quatom",
            "quantization_config": {
                "quant_method": "quatom",
                "recipe": recipe.to_dict(),
                "modules_to_not_convert": skipped,
            },
        }

    def _block_tensors(self, index: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: self._tensors[name] for name in layer_tensors(self.plan.layers[index])}

    def _shard(self, index: int) -> Path:
        """File of block `index`; -1 is the one of all other tensors."""
        count = self.source.model_config.num_layers + 1
        return self._folder / f"model-{index + 2:05d}-of-{count:05d}.safetensors"

    def _state_file(self, name: str) -> Path:
        return self._state / f"{name}.safetensors"

    def _renamed_before_a_crash(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether a run like this one was killed between its last rename and its clean-up."""
        if not self.target.exists() or not self.work.exists() or self._folder.exists():
            return False
        if not any(file.is_file() for file in self.work.rglob("*")):
            return True  # killed while it removed the empty folders: nothing else leaves them
        run = self._state / "run.json"
        return run.exists() and read_json(run) == json.loads(json.dumps(fingerprint))

    def _start(self, fingerprint: Mapping[str, Any]) -> None:
        run = self._state / "run.json"
        with self._disk_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._state.mkdir(exist_ok=True)
            self._lock = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{self.work} is being written by another process") from error
        if run.exists():
            self._check_fingerprint(read_json(run), json.loads(json.dumps(fingerprint)))
        elif any(self._folder.iterdir()):
            raise CheckpointError(f"{self.work} has shards but no {run.name}; delete it")
        else:
            self._write_json(run, fingerprint)
        needed, free = self._missing_bytes(), shutil.disk_usage(self.work).free
        if needed > free:
            raise CheckpointError(
                f"{self.work} needs {needed:,} more bytes, the disk has {free:,}; free some, then "
                "run again with --resume"
            )

    def _check_fingerprint(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in now:
            if before.get(key) != now[key]:
                was, is_ = _first_difference(before.get(key), now[key], key)
                raise CheckpointError(
                    f"{self.work} was begun with another {key} ({was}; now {is_}); use the same, "
                    "or delete the folder to start over"
                )

    def _missing_bytes(self) -> int:
        files = (file for file in self._folder.iterdir() if file.suffix == ".safetensors")
        written = sum(file.stat().st_size for file in files)
        return max(sum(_num_bytes(spec) for spec in self._tensors.values()) - written, 0)

    def _write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with self._disk_errors(), self._atomic(path) as stream:
            stream.write(text.encode())

    def _write_shard(
        self,
        path: Path,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        load: Callable[[str], Tensor],
    ) -> None:
        with self._disk_errors(), self._atomic(path) as stream:
            write_tensors(stream, specs, load)

    @contextmanager
    def _atomic(self, path: Path) -> Iterator[BinaryIO]:
        """A file that appears under its name complete and synced, or not at all."""
        temporary = self._state / f"{path.name}.tmp"
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync(path.parent)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise CheckpointError(f"cannot write {self.work}: {error}") from error
            needed, free = self._missing_bytes(), shutil.disk_usage(self.work).free
            raise CheckpointError(
                f"the disk of {self.work} is full: {needed:,} more bytes are needed, {free:,} are "
                "free; free some, then run again with --resume"
            ) from error


def check_target(target: str | Path, *, resume: bool = False) -> Path:
    """The folder of a new checkpoint; where a run is resumed, it may be there already.

    Raises:
        CheckpointError: no folder can have that name, something of the name exists, or an
            interrupted run is in the way.
    """
    path = Path(target)
    if path.name in ("", ".."):
        raise CheckpointError(f"{target} is an existing folder; give the name of a new one")
    if (length := len(os.fsencode(path.name))) > _LONGEST_NAME:
        raise CheckpointError(
            f"{path.name[:40]!r}... has {length} bytes, more than the {_LONGEST_NAME} "
            "that names of folders may have; give a shorter name"
        )
    if not resume:
        _check_absent(path)
        if (work := _working_folder(path)).exists():
            raise CheckpointError(
                f"{work} holds an interrupted run; continue it with --resume, or delete it"
            )
    return path


def _check_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; choose another target or delete it")


def _working_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _num_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    return prod(spec[0]) * spec[1].itemsize


def _first_difference(before: Any, now: Any, path: str) -> tuple[str, str]:
    """The first differing entries of nested dicts, as 'a.b = value'."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}")
    return f"{path} = {before!r}", f"{now!r}"
