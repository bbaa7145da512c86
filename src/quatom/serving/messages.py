"""What the server's and the engine's process tell each other, in msgpack.

The engine sends one message for a whole step. Engine types (`SamplingParams`, `SequenceDelta`)
travel as they are, so a field that is added to one of them needs nothing here.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

import quatom.errors
from quatom.engine.outputs import SequenceDelta
from quatom.engine.sampling import SamplingParams
from quatom.errors import QuatomError
from quatom.serving.engine_state import EngineFacts, EngineStats


class _Message(msgspec.Struct, array_like=True, tag=True):
    pass


class Prepare(_Message):
    """Check a request and keep it."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams


class Run(_Message):
    """Run a request that was prepared."""

    request_id: str


class Drop(_Message):
    """Forget a request, whatever has become of it."""

    request_id: str


class Quit(_Message):
    """End the process."""


Command = Prepare | Run | Drop | Quit


class Failure(_Message):
    """A QuatomError, by the name of its class."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Any exception; one that nobody raised on purpose becomes a plain QuatomError."""
        text = str(error).encode(errors="backslashreplace").decode()  # a path may be no UTF-8
        if isinstance(error, QuatomError):
            return cls(type(error).__name__, text)
        if isinstance(error, OSError):
            return cls("QuatomError", text)
        return cls("QuatomError", f"{type(error).__name__}: {text}")

    def error(self) -> QuatomError:
        """The exception again."""
        kind: type[QuatomError] = getattr(quatom.errors, self.kind)
        return kind(self.message)


class Ready(_Message):
    """The engine takes requests."""

    facts: EngineFacts


class NotStarted(_Message):
    """There is no engine: the model cannot be loaded, or does not fit. The process ends."""

    failure: Failure


class Prepared(_Message):
    """The request is checked and kept."""

    request_id: str
    num_sequences: int


class Refused(_Message):
    """The request is not valid, or cannot be run."""

    request_id: str
    failure: Failure


class Step(_Message):
    """What one step added, and the engine's state after it; no deltas: only the state changed."""

    deltas: list[SequenceDelta]
    stats: EngineStats
    queued: int
    """Commands that the engine has not obeyed yet."""
    seen: list[str]
    """Requests to run that have come in since the last message."""


class Alive(_Message):
    """The engine makes progress, or has nothing to do."""


class Stopped(_Message):
    """The engine has failed for good. The process ends."""

    message: str


Report = Ready | NotStarted | Prepared | Refused | Step | Alive | Stopped


def _encode_other(value: Any) -> Any:
    if isinstance(value, Mapping):  # SamplingParams.logit_bias is a read-only view
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")


ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_other)
COMMAND_DECODER: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
REPORT_DECODER: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
