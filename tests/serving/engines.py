"""Engines around the hash model. The engine's process imports this module too, so it is light."""

import time

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from tests.engine.doubles import byte_tokenizer, hash_loaded


def make_engine(
    num_blocks=4000, *, loaded_options=None, max_position=512, step_seconds=0.0, **options
):
    defaults = dict(max_num_seqs=64, max_num_batched_tokens=256, block_size=16, max_waiting=1000)
    config = EngineConfig(**{**defaults, **options, "kv_cache_memory": num_blocks * 16 * 8})
    loaded = hash_loaded(
        tokenizer=byte_tokenizer(), max_position=max_position, **(loaded_options or {})
    )
    engine = Engine(loaded, config)
    if step_seconds:
        step = engine.step
        engine.step = lambda: (time.sleep(step_seconds), step())[1]
    return engine
