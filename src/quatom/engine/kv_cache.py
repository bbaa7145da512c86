"""How many KV blocks there are: by a given number of bytes, or by the memory measured free."""

from collections.abc import Callable

import torch

from quatom.engine.config import EngineConfig
from quatom.engine.model import Model
from quatom.errors import EngineError

CPU_DEFAULT_BYTES = 2**30


def count_blocks(
    model: Model,
    config: EngineConfig,
    max_model_len: int,
    device: torch.device,
    run_largest_step: Callable[[], None],
) -> int:
    """KV blocks that the engine may allocate.

    Args:
        run_largest_step: runs one step of max_num_batched_tokens tokens without a cache to speak
            of, so that its peak of activation memory is known on a GPU.

    Raises:
        EngineError: not even one sequence of max_model_len tokens fits.
    """
    bytes_per_block = sum(p.bytes_per_block for p in model.allocate_kv_cache(1, config.block_size))
    # One more than the longest sequence fills: a shared block may have to be copied.
    smallest = -(-max_model_len // config.block_size) + 1
    if config.kv_cache_memory is not None:
        available = config.kv_cache_memory
    elif device.type == "cuda":
        available = _measure_free(device, config.memory_fraction, run_largest_step)
    else:
        available = min(
            max(CPU_DEFAULT_BYTES, smallest * bytes_per_block),
            config.max_num_seqs * smallest * bytes_per_block,
        )
    num_blocks = available // bytes_per_block
    if num_blocks < smallest:
        raise EngineError(
            f"the KV cache has {available / 2**20:.1f} MiB, {num_blocks} blocks of "
            f"{config.block_size} tokens; one sequence of {max_model_len} tokens needs "
            f"{smallest} blocks, {smallest * bytes_per_block / 2**20:.1f} MiB: raise "
            "--kv-cache-memory or lower --max-model-len"
        )
    return num_blocks


def _measure_free(device: torch.device, fraction: float, run: Callable[[], None]) -> int:
    """Bytes left under `fraction` of the GPU's memory once the largest step has run."""
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.memory_stats(device)["allocated_bytes.all.peak"]
    resident = torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (peak - resident) - (1.0 - fraction) * total)
