"""EngineConfig: how much runs at once, and where its KV cache comes from."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from quatom.errors import EngineError

_LEAST = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_prefill_chunk": 1,
    "max_model_len": 1,
    "max_waiting": 1,
    "block_size": 1,
    "kv_cache_memory": 1,
    "prefill_graph_tokens": 0,
}
"""Fields that are integers, and the least that they may be."""
_SWITCHES = (
    "forecast_admission",
    "prefix_caching",
    "overlap",
    "cuda_graphs",
    "keep_freed_memory",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine. A field that is None is set by the model and the device at the start."""

    max_num_seqs: int = 256
    """Sequences that run at once."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step, prompt chunks and decodes together."""
    max_prefill_chunk: int | None = None
    """Prompt tokens of one sequence in one step while other prompts wait, so that a long prompt
    does not delay short ones; None: half of max_num_batched_tokens."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output; None: the model's own limit."""
    max_waiting: int | None = None
    """Sequences that may queue; more are refused (HTTP 429). None: no bound."""
    block_size: int = 32
    """Tokens per KV block."""
    kv_cache_memory: int | None = None
    """Bytes of KV cache. None on a GPU: what a measured run leaves of memory_fraction. None on a
    CPU: enough for max_num_seqs sequences, at most 1 GiB."""
    memory_fraction: float = 0.9
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
    prefill_graph_tokens: int | None = None
    """Tokens of the largest step with prompts that is replayed; 0: only decode steps are; None:
    max_num_batched_tokens."""
    keep_freed_memory: bool = False
    """Make the C library keep memory that is freed in this process (glibc's mallopt). That saves
    about a fifth of a decode step on a CPU, and changes the allocator of the whole process."""

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise EngineError(f"{name} must be an integer, got {value!r:.60}")
            if value < least:
                raise EngineError(f"{name} must be at least {least}, got {value}")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name in optional):
                raise EngineError(f"{name} must be true or false, got {value!r:.60}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: a decode of every sequence would not fit into one step"
            )
        share: object = self.memory_fraction
        if not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise EngineError(f"memory_fraction must be in (0, 1], got {share!r:.60}")

    def resolve(self, device: torch.device, max_position: int) -> Self:
        """The same limits with every None that a device and a model decide replaced.

        Raises:
            EngineError: a limit does not fit the model.
        """
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
