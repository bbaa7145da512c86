"""The processes that quantize one model together, and how they talk: `torch.distributed`.

A process alone takes the same path and sends nothing. Every call is made by all processes.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from quatom.errors import BackendError, OtherProcessError

_PATIENCE = timedelta(hours=6)
"""Others wait while one rounds a large site. When a process dies, its launcher ends all."""


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Self:
        """Those of torch's default process group; this process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on when all processes did what is inside.

        Raises:
            OtherProcessError: another one failed. The first that failed raises its own error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # whatever it is, the others must not wait for this process
            error = caught
        failed = self.tell(None if error is None else f"{type(error).__name__}: {error}")
        first = next((rank for rank, reason in enumerate(failed) if reason is not None), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        raise OtherProcessError(f"process {first} of {self.count} failed: {failed[first]}")

    def tell(self, value: Any) -> list[Any]:
        """What each process gave, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def send(self, tensor: Tensor, target: int) -> None:
        """Send to a process that calls `receive` meanwhile."""
        dist.send(tensor.contiguous(), dst=target)

    def receive(self, like: "Description", source: int, device: torch.device) -> Tensor:
        """What process `source` sends."""
        held = like.empty(device)
        dist.recv(held, src=source)
        return held

    def from_rank(
        self, tensors: Mapping[str, Tensor], source: int, device: torch.device = _CPU
    ) -> dict[str, Tensor]:
        """Tensors of process `source`, everywhere; on `device` if they are on such a one there."""
        if self.count == 1:
            return dict(tensors)
        found = {}
        for name, like in self.tell(describe(tensors))[source].items():
            held = tensors[name].contiguous() if self.rank == source else like.empty(device)
            dist.broadcast(held, src=source)
            found[name] = held
        return found


class Description(NamedTuple):
    """What another process must know of a tensor to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool

    def empty(self, device: torch.device) -> Tensor:
        """Such a tensor on the CPU, or on this process's device."""
        return torch.empty(self.shape, dtype=self.dtype, device="cpu" if self.on_cpu else device)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, Description]:
    """Descriptions by name, in an order that all processes have."""
    return {
        name: Description(tuple(held.shape), held.dtype, held.device.type == "cpu")
        for name, held in sorted(tensors.items())
    }


@contextmanager
def process_group(device: str | None) -> Iterator[str | None]:
    """Join the processes that torchrun started, for the time inside; one alone joins nothing.

    Yields:
        The device of this process: its own GPU, unless the CPU was asked for.

    Raises:
        BackendError: there are more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise BackendError(
                f"process {local} of this machine has no GPU, torch sees {gpus}: start one "
                "process per GPU, or give --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()
