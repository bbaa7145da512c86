"""Measure every configuration of the Hopper linear kernel and write down the fastest ones.

    python -m quatom.benchmark.tune_linear --out src/quatom/ops/linear/tuning.json

`quatom.ops.linear.cuda.choose_config` reads the result. The shapes are those of Llama-2-7B and
Llama-3-8B layers and of a small model; other shapes use the most similar one.
"""

import argparse
import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quatom.benchmark.environment import describe_environment
from quatom.benchmark.kernel_operands import hopper_operands
from quatom.benchmark.timing import time_graphs
from quatom.numerics.groups import ScaleMode
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.linear.configs import CONFIGS, Config
from quatom.ops.linear.cuda import defines, kernel_source, linear_cuda

SHAPES = (
    (12288, 4096),
    (22016, 4096),
    (4096, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (1152, 896),
)
"""(N, K)"""
_ACTIVATIONS: dict[bool, tuple[str, ScaleMode]] = {
    False: ("int4", "group"),
    True: ("int8", "row"),
}
"""Format and scales that stand for all that `Config.integer` means."""
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


def plausible(
    config: Config, tokens: int, row_blocks: int, units: int, sms: int, *, integer: bool
) -> bool:
    """Leave out what cannot win: padding to twice the tokens, or many waves of split work."""
    if config.integer != integer:
        return False
    if config.split > units or (config.ctas_per_sm > 1 and tokens > 128):
        return False
    row_tiles = -(-row_blocks // config.row_blocks)
    slots = sms * config.ctas_per_sm
    if tokens <= 64:
        fits = tokens <= config.tokens <= max(8, 2 * tokens) and config.tokens <= 64
        work = row_tiles * config.split
        return fits and (work <= 1.4 * slots) and (work >= 0.4 * slots or config.split >= 4)
    work = row_tiles * -(-tokens // config.tokens) * config.split
    return config.tokens <= 2 * tokens and (config.split == 1 or work <= 2 * slots)


def tune(repeats: int = 5) -> dict[str, Any]:
    """Time all plausible configurations of all problems, those of one problem in turns."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, CONFIGS))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    choices, timings = [], []
    for channels, k in SHAPES:
        operands = hopper_operands(channels, k)
        for tokens, integer in product(TOKENS, (False, True)):
            fmt, scale_mode = _ACTIVATIONS[integer]
            layers = operands.layers(fmt, scale_mode)
            row_blocks, units = layers[0].tensors[0].shape[:2]
            configs = [
                config
                for config in CONFIGS
                if plausible(config, tokens, row_blocks, units, sms, integer=integer)
            ]
            x = operands.activations(tokens, fmt, scale_mode)
            measured = time_graphs(
                [
                    [
                        partial(linear_cuda, x, layer.tensors, channels, None, config)
                        for layer in layers
                    ]
                    for config in configs
                ],
                repeats=repeats,
                min_calls=8 if tokens < 1024 else 2,
            )
            times = [round(timing.median_us, 2) for timing in measured]
            timings += [
                [channels, k, tokens, dataclasses.asdict(config), time]
                for config, time in zip(configs, times, strict=True)
            ]
            best = times.index(min(times))
            choices.append(
                {
                    "row_blocks": row_blocks,
                    "units": units,
                    "tokens": tokens,
                    "integer": integer,
                    "microseconds": times[best],
                    "config": dataclasses.asdict(configs[best]),
                }
            )
    return {"environment": describe_environment(), "choices": choices, "timings": timings}


def _compile(config: Config) -> None:
    compile_cubin(kernel_source(config.columns), "sm_90a", defines(config, torch.float16))


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timings", type=Path, help="also write every single timing here")
    arguments = parser.parse_args()
    result = tune()
    timings = result.pop("timings")
    rows = ",\n".join(json.dumps(row) for row in result["choices"])
    environment = json.dumps(result["environment"])
    arguments.out.write_text(f'{{"environment": {environment},\n"choices": [\n{rows}\n]}}\n')
    if arguments.timings:
        arguments.timings.write_text(json.dumps(timings))
    for row in result["choices"]:
        print(*row.values())


if __name__ == "__main__":
    main()
