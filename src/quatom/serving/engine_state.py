"""What a server knows of its engine, wherever the engine runs."""

from dataclasses import dataclass

from quatom.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What stays the same as long as an engine runs."""

    vocab_size: int
    max_model_len: int
    """Longest sequence in tokens, prompt and output."""
    max_waiting: int | None
    """Sequences that may queue; None: no bound."""
    block_size: int
    """Tokens of one KV block."""
    num_blocks: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What changes with every step."""

    running: int = 0
    """Sequences that run."""
    waiting: int = 0
    """Sequences that wait."""
    kv_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    num_preemptions: int = 0
    """Sequences set back since the start."""
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache since the start."""
    prefix_hits: int = 0
    """Prompt tokens found there."""


def facts_of(engine: Engine) -> EngineFacts:
    """The facts of an engine in this process."""
    return EngineFacts(
        vocab_size=engine.model_config.vocab_size,
        max_model_len=engine.max_model_len,
        max_waiting=engine.config.max_waiting,
        block_size=engine.config.block_size,
        num_blocks=engine.pool.num_blocks,
        kv_cache_bytes=engine.kv_cache_bytes,
    )


def stats_of(engine: Engine) -> EngineStats:
    """The state of an engine in this process. Plain attributes: any thread may read them."""
    scheduler = engine.scheduler
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        kv_usage=engine.pool.usage,
        num_preemptions=scheduler.num_preemptions,
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
    )
