"""The CUDA graphs of an engine: of decode steps, and of steps with prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quatom.engine.config import EngineConfig
from quatom.engine.cuda_graphs import DecodeGraphs, can_capture
from quatom.engine.graph_pool import GraphPool
from quatom.engine.model import KVCacheLayer, Model
from quatom.engine.prefill_graphs import PrefillGraphs


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """Graphs that share one memory pool, because only one of them runs at a time."""

    decode: DecodeGraphs
    prefill: PrefillGraphs | None


def capture_steps(
    model: Model,
    kv_cache: Sequence[KVCacheLayer],
    config: EngineConfig,
    max_model_len: int,
    device: torch.device,
) -> StepGraphs | None:
    """Every graph that `config` asks for; None where nothing is captured."""
    if not config.cuda_graphs or not can_capture(device):
        return None
    pool = GraphPool(device)
    decode = DecodeGraphs(
        model,
        kv_cache,
        pool,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.block_size,
        device=device,
    )
    most = config.max_num_batched_tokens
    if config.prefill_graph_tokens is not None:
        most = min(most, config.prefill_graph_tokens)
    if not most:
        return StepGraphs(decode, None)
    prefill = PrefillGraphs(
        model,
        kv_cache,
        pool,
        max_num_tokens=most,
        max_num_seqs=config.max_num_seqs,
        device=device,
    )
    return StepGraphs(decode, prefill)
