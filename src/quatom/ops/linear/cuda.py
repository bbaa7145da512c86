"""The Hopper kernel of `linear`: its source, compiled for a configuration, and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.ops.activations import MixedTensor
from quatom.ops.cuda_build import (
    CudaKernel,
    KernelArguments,
    compile_cubin,
    device_name,
    load_kernel,
    multiprocessors,
    read_source,
)
from quatom.ops.groups_layout import holds_int8
from quatom.ops.linear.configs import Config, choose_config

_MOST_FILLERS = 8
"""CTAs that a launch may have without a tile."""


def kernel_source(columns: int) -> str:
    """kernel.cu preceded by the two wgmma instructions for `columns` tokens."""
    instructions = _wgmma("e4m3", columns) + _wgmma("s8", columns)
    return instructions + read_source("quatom.ops.linear", "kernel.cu")


def _wgmma(operand: str, columns: int) -> str:
    """A function that issues one m64 n`columns` k32 wgmma, A in registers, B in shared memory."""
    count = columns // 2
    accumulator, constraint, kind, scale = {
        "e4m3": ("float", "+f", "f32", ", 1, 1"),
        "s8": ("int", "+r", "s32", ""),
    }[operand]
    outputs = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    bindings = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void wgmma_{operand}({accumulator} (&d)[{count}], unsigned a0,"
        " unsigned a1, unsigned a2, unsigned a3, unsigned long long b, int accumulate) {\n"
        f'  asm volatile("{{\\n .reg .pred p;\\n setp.ne.b32 p, %{count + 5}, 0;\\n"\n'
        f'    "wgmma.mma_async.sync.aligned.m64n{columns}k32.{kind}.{operand}.{operand} '
        f'{{{outputs}}}, {{{a}}}, %{count + 4}, p{scale};\\n}}"\n'
        f'    : {bindings} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));\n}}\n'
    )


def defines(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """The constants that kernel.cu is compiled with."""
    return {
        "BM": config.tokens,
        "PARTS": config.parts,
        "SIGNED": int(config.signed),
        "INTEGER": int(config.integer),
        "EXPERTS": int(config.experts),
        "WARPGROUPS": config.warpgroups,
        "BLOCKS_PER_WARPGROUP": config.blocks,
        "STAGES": config.num_stages,
        "STREAM": int(config.streams),
        "EARLY_STAGES": config.early_stages,
        "SPLIT": config.split,
        "PRODUCER_THREADS": config.producer_threads,
        "CTAS_PER_SM": config.ctas_per_sm,
        "PRODUCER_REGISTERS": config.registers[0],
        "CONSUMER_REGISTERS": config.registers[1],
        "OUTPUT_BF16": int(dtype == torch.bfloat16),
    }


@cache
def hopper_kernel(config: Config, dtype: torch.dtype, device: int) -> CudaKernel:
    """The kernel of a configuration that writes `dtype`, loaded on a device."""
    cubin = compile_cubin(kernel_source(config.columns), "sm_90a", defines(config, dtype))
    with torch.cuda.device(device):
        return load_kernel(
            cubin,
            "linear_hopper",
            threads=config.threads,
            shared_bytes=config.shared_bytes,
            cluster=config.split,
        )


def count_clusters(tiles: int, config: Config, sms: int) -> int:
    """Clusters of a launch on a GPU of `sms` multiprocessors.

    Whole tiles are taken in turns by as many CTAs as fit. A tile whose k-range is split has a
    cluster of its own, and a few clusters without a tile keep places if all SMs then have equally
    many CTAs: an SM without work would be given two CTAs of the next linear layer.
    """
    if config.split == 1:
        return min(tiles, sms * config.ctas_per_sm)
    missing = -tiles * config.split % sms
    return tiles + (missing // config.split if missing <= _MOST_FILLERS else 0)


class LinearArguments(KernelArguments):
    """Parameters of kernel.cu."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("tokens_padded", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("normal_groups", ctypes.c_int),
        ("outlier_groups", ctypes.c_int),
        ("unit_value", ctypes.c_float),
    )


def check_operands(
    x: MixedTensor | Tensor, weights: tuple[Tensor, ...], config: Config | None
) -> MixedTensor:
    """x, if the kernel can multiply it by packed weights.

    Raises:
        BackendError: it cannot, with the reason.
    """
    if not isinstance(x, MixedTensor) or x.dtype not in (torch.float16, torch.bfloat16):
        raise BackendError(
            f"the Hopper linear kernel reads quantized activations and writes float16 or bfloat16, "
            f"got {type(x).__name__} of {x.dtype}: load the model with dtype bfloat16 or float16, "
            "or prepare the weights with backend 'triton' (QUATOM_BACKEND=triton)"
        )
    integer = len(weights) > 1
    is_int8 = holds_int8(x.spec.normal, x.spec.scale_mode)
    if is_int8 != integer or (config is not None and config.integer != integer):
        raise BackendError(
            f"weights packed for {'integers' if integer else 'e4m3 numbers'}, activations are "
            f"{x.spec.normal} with scale mode {x.spec.scale_mode!r}, the configuration is {config}"
        )
    return x


def unit_value(x: MixedTensor) -> float:
    """Real value of one step of the kernel's products.

    As e4m3, weights enter the matrix unit as (code + 8) * 2**-9, int4 activations as code * 2**-9.
    """
    if holds_int8(x.spec.normal, x.spec.scale_mode):
        return 1.0
    return 2.0**9 if x.spec.normal == "e4m3" else 2.0**18


def linear_cuda(
    x: MixedTensor | Tensor,
    weights: tuple[Tensor, ...],  # of `hopper_layout.pack_weights`
    channels: int,
    bias: Tensor | None,
    config: Config | None = None,
    *,
    overlap: bool = True,
) -> Tensor:
    """See `linear`; `config` overrides the choice of variant, for measurements."""
    x = check_operands(x, weights, config)
    packed, *row_scales = weights
    integer = bool(row_scales)
    device = packed.device.index
    config = config or choose_config(
        x.tokens, packed.shape[0], packed.shape[1], device_name(device), integer=integer
    )
    y = torch.empty((x.tokens, channels), dtype=x.dtype, device=x.device)
    if not x.tokens:
        return y
    layout = x.spec.layout
    row_tiles = -(-packed.shape[0] // config.row_blocks)
    tiles = row_tiles * -(-x.tokens // config.tokens)
    clusters = count_clusters(tiles, config, multiprocessors(device))
    hopper_kernel(config, x.dtype, device).launch(
        clusters * config.split,
        LinearArguments(
            packed.data_ptr(),
            x.codes.data_ptr(),
            x.scales.data_ptr(),
            row_scales[0].data_ptr() if row_scales else None,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.tokens,
            x.codes.shape[1],
            channels,
            layout.num_normal_groups,
            layout.num_outlier_groups,
            unit_value(x),
        ),
        overlap=overlap,
    )
    return y
