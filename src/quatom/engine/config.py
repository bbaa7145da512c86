"""EngineConfig: how much runs at once, and where its KV cache comes from."""

import os
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch

from quatom.arguments import Range, check_fields
from quatom.errors import EngineError

MAX_SEQS = 2**16
"""Most sequences that run at once."""
MAX_BLOCK = 2**16
"""Most tokens of a block."""
_Positive = Annotated[int, Range(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine. A field that is None is set by the model and the device at the start."""

    max_num_seqs: Annotated[int, Range(1, MAX_SEQS)] = 256
    """Sequences that run at once."""
    max_num_batched_tokens: _Positive = 2048
    """Tokens of one step, prompt chunks and decodes together."""
    max_prefill_chunk: _Positive | None = None
    """Prompt tokens of one sequence in one step while other prompts wait, so that a long prompt
    does not delay short ones; None: half of max_num_batched_tokens."""
    max_model_len: _Positive | None = None
    """Longest sequence, prompt and output; None: the model's own limit."""
    max_waiting: _Positive | None = None
    """Sequences that may queue; more are refused (HTTP 429). None: no bound."""
    block_size: Annotated[int, Range(1, MAX_BLOCK)] = 32
    """Tokens per KV block."""
    kv_cache_memory: _Positive | None = None
    """Bytes of KV cache. None on a GPU: what a measured run leaves of memory_fraction. None on a
    CPU: enough for max_num_seqs sequences, at most 1 GiB."""
    memory_fraction: Annotated[float, Range(0, 1, open_low=True)] = 0.9
    """Share of GPU memory that the process may use."""
    forecast_admission: bool = True
    """Admit a request only if the KV cache is expected to hold all running requests until they end.
    False: admit it as soon as its own tokens fit, at the price of preemptions."""
    prefix_caching: bool = True
    """Reuse KV blocks of earlier requests with the same prefix."""
    overlap: bool | None = None
    """Launch step i + 1 before the tokens of step i have been read back; None: only on a GPU."""
    cuda_graphs: bool = True
    """Replay steps as CUDA graphs on a GPU, unless QUATOM_BACKEND asks for the reference."""
    prefill_graph_tokens: Annotated[int, Range(0)] | None = None
    """Tokens of the largest step with prompts that is replayed; 0: only decode steps are; None:
    max_num_batched_tokens."""
    keep_freed_memory: bool = False
    """Make the C library keep memory that is freed in this process (glibc's mallopt). That saves
    about a fifth of a decode step on a CPU, and changes the allocator of the whole process."""

    def __post_init__(self) -> None:
        check_fields(self, EngineError)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: a decode of every sequence would not fit into one step"
            )

    def check_memory(self, device: torch.device) -> None:
        """Refuse a KV cache that no memory of the device holds, before there is a model in it.

        Raises:
            EngineError: kv_cache_memory is more than the device's memory.
        """
        if self.kv_cache_memory is None:
            return
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.kv_cache_memory > total:
            raise EngineError(
                f"kv_cache_memory {self.kv_cache_memory:,} is more than the {total:,} bytes of "
                f"memory that device {str(device)!r} has: give less"
            )

    def resolve(self, device: torch.device, max_position: int) -> Self:
        """The same limits with every None that a device and a model decide replaced.

        Raises:
            EngineError: a limit does not fit the model, or the device.
        """
        self.check_memory(device)
        if self.max_model_len is not None and self.max_model_len > max_position:
            raise EngineError(
                f"max_model_len {self.max_model_len} is above the model's own limit of "
                f"{max_position} positions: give at most that"
            )
        return replace(
            self,
            max_model_len=self.max_model_len or max_position,
            max_prefill_chunk=self.max_prefill_chunk or max(1, self.max_num_batched_tokens // 2),
            overlap=device.type == "cuda" if self.overlap is None else self.overlap,
        )
