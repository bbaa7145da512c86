"""Measure every configuration of the Hopper linear kernel and write down the fastest ones.

    python -m quatom.benchmark.tune_linear --out src/quatom/ops/linear/tuning.json

`quatom.ops.linear.cuda.choose_config` reads the result. The shapes are those of Llama-2-7B and
Llama-3-8B layers and of a small model; other shapes use the most similar one.
"""

import argparse
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from quatom.benchmark.environment import describe_environment
from quatom.benchmark.kernels import hopper_operands
from quatom.benchmark.timing import time_graph
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.linear.cuda import CONFIGS, Config, defines, kernel_source, linear_cuda

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
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)


def plausible(config: Config, tokens: int, row_blocks: int, units: int, sms: int) -> bool:
    """Leave out what cannot win: padding to twice the tokens, many waves of split work."""
    if config.split > units or (config.ctas_per_sm > 1 and tokens > 64):
        return False
    if tokens <= 64:
        fits = tokens <= config.tokens <= max(8, 2 * tokens) and config.tokens <= 64
        work = -(-row_blocks // config.row_blocks) * config.split
        slots = sms * config.ctas_per_sm
        return fits and (work <= 1.4 * slots) and (work >= 0.4 * slots or config.split >= 4)
    tiles = -(-row_blocks // config.row_blocks) * -(-tokens // config.tokens)
    return config.split == 1 or tiles * config.split <= 4 * sms


def tune(repeats: int = 7) -> dict[str, Any]:
    """Time all plausible configurations of all problems; about half a minute on an H100."""
    with ThreadPoolExecutor() as pool:  # NVRTC releases the interpreter lock
        list(
            pool.map(
                lambda c: compile_cubin(
                    kernel_source(c.tokens), "sm_90a", defines(c, torch.float16)
                ),
                CONFIGS,
            )
        )
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    choices, timings = [], []
    for channels, k in SHAPES:
        operands = hopper_operands(channels, k)
        row_blocks, units = operands.weights[0].shape[:2]
        for tokens in TOKENS:
            x = operands.activations(tokens, "int4")
            best: tuple[float, Config] | None = None
            for config in CONFIGS:
                if not plausible(config, tokens, row_blocks, units, sms):
                    continue
                calls = [
                    lambda w=w, n=channels, c=config, x=x: linear_cuda(x, w, n, None, c)
                    for w in operands.weights
                ]
                time = time_graph(calls, repeats=repeats).median_us
                timings.append([channels, k, tokens, dataclasses.astuple(config), round(time, 2)])
                if best is None or time < best[0]:
                    best = (time, config)
            assert best is not None, "every problem has a plausible configuration"
            choices.append(
                {
                    "row_blocks": row_blocks,
                    "units": units,
                    "tokens": tokens,
                    "microseconds": round(best[0], 2),
                    "config": dataclasses.asdict(best[1]),
                }
            )
    return {"environment": describe_environment(), "choices": choices, "timings": timings}


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
        print(row["row_blocks"], row["units"], row["tokens"], row["microseconds"], row["config"])


if __name__ == "__main__":
    main()
