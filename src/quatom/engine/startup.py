"""Start an engine: within a memory budget that counts everything, and with nothing left to compile.

What the model takes besides its KV cache is measured, not estimated: an engine with the smallest
useful cache runs the largest steps, and what the driver then counts as used, less that cache, is
taken off the budget.
"""

import gc
from dataclasses import replace
from itertools import cycle

import torch

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.prefill_graphs import PADDING_SHARE, step_classes
from quatom.engine.sampling import SamplingParams
from quatom.errors import EngineError
from quatom.loading import LoadedModel

GIB = 2**30
RESERVE = 128 * 2**20
"""Bytes left unused: steps of other sizes than the warm-up's fragment the allocator's memory."""
MIN_MODEL_LEN = 16
"""Room that the shortest sequences of the warm-up take."""


def build_engine(loaded: LoadedModel, config: EngineConfig, gpu_memory: float | None) -> Engine:
    """An engine that has compiled, captured and run every kind of step once.

    Args:
        loaded: the model.
        config: limits; a budget replaces its kv_cache_memory.
        gpu_memory: GiB for everything, the CUDA context included, as vLLM counts; on a CPU for
            weights and KV cache. None: config decides.

    Raises:
        EngineError: the budget is larger than the GPU or too small for one sequence.
    """
    if gpu_memory is not None:
        kv_bytes = _measure_kv_bytes(loaded, config, int(gpu_memory * GIB))
        config = replace(config, kv_cache_memory=kv_bytes)
    engine = Engine(loaded, config)
    if engine.max_model_len >= MIN_MODEL_LEN:
        warm_up(engine)
    return engine


def bytes_in_use(loaded: LoadedModel) -> int:
    """Bytes that the driver counts as used on the model's GPU; on a CPU the model's tensors."""
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        return total - free
    return sum(t.numel() * t.element_size() for t in _tensors(loaded))


def release_memory() -> None:
    """Give back what dropped models and engines held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm_up(engine: Engine) -> None:
    """Run steps of every size class, alone and mixed with decodes, so that no run compiles.

    Afterwards the engine has counted nothing and knows no prefix. Its max_model_len must be at
    least MIN_MODEL_LEN.
    """
    budget, longest = engine.config.max_num_batched_tokens, engine.max_model_len
    first_tokens = cycle(range(engine.model_config.vocab_size))

    def prompt(length: int) -> list[int]:  # one that the prefix cache does not know
        return [next(first_tokens)] * length

    generate(engine, [[1, 2, 3]] * engine.config.max_num_seqs, 3)  # full decode batches
    for size in step_sizes(budget):
        piece = min(size, longest - 2)
        prompts = [prompt(min(piece, size - start)) for start in range(0, size, piece)]
        generate(engine, prompts[: engine.config.max_num_seqs], 2)
    # One that decodes while the other's prompt runs.
    engine.add_request("warm-up-decode", [1], greedy(longest - 1))
    for _ in range(3):
        engine.step()
    engine.add_request("warm-up-prompt", prompt(min(max(1, budget - 1), longest - 2)), greedy(2))
    for _ in range(3):
        engine.step()
    for name in ("decode", "prompt"):
        engine.abort(f"warm-up-{name}")
    while engine.has_work:
        engine.step()
    engine.pool.forget_prefixes()
    engine.scheduler.reset_counters()


def step_sizes(most: int) -> list[int]:
    """Tokens of the steps that warm-up runs: powers of two, once and a half, up to `most`.

    And the largest step that fills no size class of the prefill graphs, which runs without.
    """
    return sorted({*step_classes(most), max(1, most - most // PADDING_SHARE - 1)})


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly `max_tokens` tokens, the most likely each time."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)


def generate(engine: Engine, prompts: list[list[int]], count: int) -> None:
    """Generate `count` tokens for each prompt and forget them."""
    limit = engine.config.max_waiting
    for i, prompt in enumerate(prompts):
        while limit is not None and len(engine.scheduler.waiting) >= limit:
            engine.step()
        engine.add_request(f"warm-up-{i}", prompt, greedy(count))
    while engine.has_work:
        engine.step()


def _measure_kv_bytes(loaded: LoadedModel, config: EngineConfig, budget: int) -> int:
    """Bytes of KV cache that the budget leaves."""
    if loaded.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(loaded.device)
        if budget > total:
            raise EngineError(
                f"a budget of {budget / GIB:.2f} GiB is more than the GPU's {total / GIB:.2f} GiB"
            )
        reserve = RESERVE
        release_memory()
        used = _used_without_cache(loaded, config)
        release_memory()
    else:
        reserve, used = 0, bytes_in_use(loaded)
    left = budget - used - reserve
    if left <= 0:
        raise EngineError(
            f"{loaded.source} as {loaded.recipe.name} takes {(used + reserve) / GIB:.2f} GiB "
            f"without a KV cache, the budget is {budget / GIB:.2f} GiB: raise --gpu-memory or "
            "choose a smaller recipe"
        )
    return left


def _used_without_cache(loaded: LoadedModel, config: EngineConfig) -> int:
    """Bytes in use after the largest steps have run on a small cache, that cache not counted."""
    max_model_len = config.max_model_len or loaded.config.max_position
    # Every sequence of a full batch has a block, and the longest prompts of one step fit.
    blocks = 2 * (-(-max_model_len // config.block_size)) + 2
    blocks += config.max_num_batched_tokens // config.block_size
    blocks += config.max_num_seqs
    layers = loaded.model.allocate_kv_cache(1, config.block_size)
    probe_bytes = blocks * sum(layer.bytes_per_block for layer in layers)
    del layers
    engine = Engine(loaded, replace(config, kv_cache_memory=probe_bytes))
    warm_up(engine)
    return bytes_in_use(loaded) - engine.kv_cache_bytes


def _tensors(loaded: LoadedModel) -> list[torch.Tensor]:
    model = loaded.model
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        prepared = getattr(module, "prepared", None)
        if prepared is not None:
            tensors += [t for t in (*prepared.tensors, prepared.bias) if t is not None]
    return tensors
