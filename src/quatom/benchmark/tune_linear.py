"""Measure every configuration of the Hopper linear kernel and write down the fastest ones.

    python -m quatom.benchmark.tune_linear --out src/quatom/ops/linear/tuning-h200.json

`quatom.ops.linear.configs.choose_config` reads the table of the GPU that it runs on. The shapes are
those of Llama layers, of a small model and of attention in Qwen3-30B-A3B; other shapes use the most
similar one. Few tokens are measured as a model runs them: each linear layer after the kernel that
quantizes its input.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatom.benchmark.environment import describe_environment
from quatom.benchmark.kernel_operands import HopperOperands, hopper_operands
from quatom.benchmark.timing import time_graphs
from quatom.families.spec import Norm
from quatom.numerics.groups import ScaleMode
from quatom.ops.activations import QuantizeSpec
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.linear import PreparedLinear
from quatom.ops.linear.configs import CONFIGS, Config
from quatom.ops.linear.cuda import defines, kernel_source, linear_cuda
from quatom.ops.norm_quantize import norm_quantize

SHAPES = (
    (12288, 4096),
    (22016, 4096),
    (4096, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
    (1152, 896),
    (5120, 2048),
    (2048, 4096),
)
"""(N, K)"""
_INNER = 11008
"""With this K or more, a layer's input is gated, not normalized."""
_ACTIVATIONS: dict[bool, tuple[str, ScaleMode]] = {
    False: ("int4", "group"),
    True: ("int8", "row"),
}
"""Format and scales that stand for all that `Config.integer` means."""
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_CHAINED = 64
"""Tokens up to which the kernel that quantizes the input is measured too."""


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
        few = work <= 1.4 * slots or (config.split == 1 and integer)
        return fits and few and (work >= 0.4 * slots or config.split >= 4)
    work = row_tiles * -(-tokens // config.tokens) * config.split
    fits = min(tokens // 8, 96) <= config.tokens <= 2 * tokens
    return fits and (config.split == 1 or work <= 2 * slots)


def tune(
    repeats: int = 5,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    kinds: Sequence[bool] = (False, True),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time all plausible configurations of all problems, those of one problem in turns."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    choices: list[dict[str, Any]] = []
    timings: list[list[Any]] = []
    for channels, k in shapes:
        operands = hopper_operands(channels, k)
        for tokens, integer in product(TOKENS, kinds):
            row_blocks, units = operands.integer[0].tensors[0].shape[:2]
            configs = [
                config
                for config in CONFIGS
                if plausible(config, tokens, row_blocks, units, sms, integer=integer)
            ]
            measured = time_graphs(
                _calls(operands, channels, k, tokens, integer, configs),
                repeats=repeats,
                min_calls=8 if tokens < 1024 else 2,
            )
            times = [round(timing.median_us, 2) for timing in measured]
            timings += [
                [channels, k, tokens, _fields(config), time]
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
                    "config": _fields(configs[best]),
                }
            )
            report(f"{channels} x {k}, {tokens}: {times[best]} us, {choices[-1]['config']}")
        del operands
        torch.cuda.empty_cache()
    return {"environment": describe_environment(), "choices": choices, "timings": timings}


def _calls(
    operands: HopperOperands,
    channels: int,
    k: int,
    tokens: int,
    integer: bool,
    configs: Sequence[Config],
) -> list[list[Callable[[], object]]]:
    """What one problem runs under each configuration, on each copy of its weights."""
    fmt, scale_mode = _ACTIVATIONS[integer]
    layers = operands.layers(fmt, scale_mode)
    if tokens > _CHAINED:
        x = operands.activations(tokens, fmt, scale_mode)
        return [
            [partial(linear_cuda, x, layer.tensors, channels, None, config) for layer in layers]
            for config in configs
        ]
    spec = QuantizeSpec(
        layout=operands.layout,
        normal=fmt,
        scale_mode=scale_mode,
        rotate=integer,
        byte_layout="groups",
    )
    inputs = torch.randn(tokens, 2 * k if k >= _INNER else k, device="cuda").half()
    weight, order = torch.rand(k, device="cuda").half(), torch.randperm(k, device="cuda").int()
    residual, norm = torch.randn_like(inputs), Norm(eps=1e-5)

    def chain(layer: PreparedLinear, config: Config) -> Tensor:
        if k >= _INNER:
            x = gated_quantize(inputs, spec, "silu", True)
        else:
            x, _ = norm_quantize(inputs, weight, order, spec, norm=norm, residual=residual)
        return linear_cuda(x, layer.tensors, channels, None, config)

    return [[partial(chain, layer, config) for layer in layers] for config in configs]


def _fields(config: Config) -> dict[str, Any]:
    """What a configuration has besides defaults."""
    default = Config(0, 0)
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value != getattr(default, name) and name != "integer"
    }


def compile_all() -> None:
    """Compile all configurations, in as many processes as there are cores."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, CONFIGS))


def _compile(config: Config) -> None:
    compile_cubin(kernel_source(config.columns), "sm_90a", defines(config, torch.float16))


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timings", type=Path, help="also write every single timing here")
    arguments = parser.parse_args()
    compile_all()
    result = tune()
    timings = result.pop("timings")
    rows = ",\n".join(json.dumps(row) for row in result["choices"])
    environment = json.dumps(result["environment"])
    arguments.out.write_text(f'{{"environment": {environment},\n"choices": [\n{rows}\n]}}\n')
    if arguments.timings:
        arguments.timings.write_text(json.dumps(timings))


if __name__ == "__main__":
    main()
