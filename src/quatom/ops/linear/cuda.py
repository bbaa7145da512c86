"""The Hopper kernel of `linear`: which configuration runs, and its launch."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from quatom.errors import BackendError
from quatom.ops.activations import MixedTensor
from quatom.ops.cuda_build import CudaKernel, compile_cubin, load_kernel
from quatom.ops.linear.hopper_layout import BLOCK_ROWS, UNIT_BYTES

_SHARED_BYTES = 227 * 1024
"""Shared memory that one CTA may have on Hopper."""
_RESERVED_BYTES = 1024
"""Shared memory of an SM that the system takes from each resident CTA."""


@dataclass(frozen=True, slots=True)
class Config:
    """A compiled variant of the kernel; docs/kernels-linear.md says what each number does."""

    tokens: int
    """BM: tokens of a tile."""
    warpgroups: int
    """Consumer warpgroups, 64 output channels each."""
    split: int = 1
    """CTAs that share a tile's k-range."""
    multicast: int = 1
    """CTAs that share a token tile and load it once."""
    ctas_per_sm: int = 1
    stages: int = 0
    """Units in flight; 0: as many as fit."""

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: activations, weights, activation scales, two barriers."""
        return self.tokens * 132 + self.warpgroups * UNIT_BYTES + 16

    @property
    def receive_bytes(self) -> int:
        """Shared memory for the partial sums of the other CTAs of a cluster that splits k."""
        owned_blocks = -(-(self.tokens // 8) // self.split) if self.split > 1 else 0
        return owned_blocks * (self.split - 1) * self.warpgroups * 2048 + 8

    @property
    def num_stages(self) -> int:
        """Stages of the ring."""
        if self.stages:
            return self.stages
        room = (_SHARED_BYTES + _RESERVED_BYTES) // self.ctas_per_sm - _RESERVED_BYTES
        return min((room - self.receive_bytes) // self.stage_bytes, 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.num_stages * self.stage_bytes + self.receive_bytes

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.split * self.multicast

    @property
    def producer_threads(self) -> int:
        """A whole warpgroup where registers are handed from the producer to the consumers."""
        return 128 if self.ctas_per_sm == 1 and self.warpgroups > 1 else 32

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer and a consumer thread; zeros where all have the same number.

        setmaxnreg can only hand around what the launch gave the CTA, a multiple of 8 a thread:
        asking for one step more waits forever.
        """
        if self.producer_threads < 128:
            return 0, 0
        given = 65536 // self.threads // 8 * 8 * self.threads
        producer = 40 if self.warpgroups == 2 else 32
        return producer, (given - producer * 128) // (128 * self.warpgroups) // 8 * 8

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups + self.producer_threads


def kernel_source(tokens: int) -> str:
    """kernel.cu preceded by the two wgmma instructions for tiles of `tokens` tokens."""
    text = (files("quatom.ops.linear") / "kernel.cu").read_text()
    return _wgmma("e4m3", tokens) + _wgmma("s8", tokens) + text


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
        "WARPGROUPS": config.warpgroups,
        "STAGES": config.num_stages,
        "SPLIT": config.split,
        "MULTICAST": config.multicast,
        "PRODUCER_THREADS": config.producer_threads,
        "CTAS_PER_SM": config.ctas_per_sm,
        "PRODUCER_REGISTERS": config.registers[0],
        "CONSUMER_REGISTERS": config.registers[1],
        "OUTPUT_BF16": int(dtype == torch.bfloat16),
    }


@cache
def _kernel(config: Config, dtype: torch.dtype, device: int) -> CudaKernel:
    cubin = compile_cubin(kernel_source(config.tokens), "sm_90a", defines(config, dtype))
    with torch.cuda.device(device):
        return load_kernel(
            cubin,
            "linear_hopper",
            threads=config.threads,
            shared_bytes=config.shared_bytes,
            cluster=config.cluster,
        )


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_config(tokens: int, channels: int, units: int, multiprocessors: int) -> Config:
    """The configuration for T tokens, N output channels and a k-range of `units` units."""
    if tokens > 64:
        return Config(tokens=128, warpgroups=2)
    bm = next(size for size in (8, 16, 32, 64) if tokens <= size)
    blocks = -(-channels // BLOCK_ROWS)
    ctas = 3
    split = min(8, units, max(1, ctas * multiprocessors // blocks))
    return Config(tokens=bm, warpgroups=1, split=split, ctas_per_sm=ctas)


def linear_cuda(
    x: MixedTensor | Tensor,
    packed: Tensor,  # (ceil(N / 64), units, 4224) uint8
    channels: int,
    bias: Tensor | None,
    config: Config | None = None,
    *,
    overlap: bool = True,
) -> Tensor:
    """See `linear`; `config` overrides the choice of variant, for measurements."""
    if not isinstance(x, MixedTensor) or x.dtype not in (torch.float16, torch.bfloat16):
        raise BackendError(
            f"the Hopper linear kernel reads quantized activations and writes float16 or bfloat16, "
            f"got {type(x).__name__} of {x.dtype}: prepare the weights with backend 'triton'"
        )
    if channels % 4:
        raise BackendError(
            f"the Hopper linear kernel stores four channels at a time, got N = {channels}: pad the "
            "weights or prepare them with backend 'triton'"
        )
    device = packed.device.index
    config = config or choose_config(x.tokens, channels, packed.shape[1], _multiprocessors(device))
    y = torch.empty((x.tokens, channels), dtype=x.dtype, device=x.device)
    if not x.tokens:
        return y
    layout = x.spec.layout
    row_tiles = -(-packed.shape[0] // (config.warpgroups * config.multicast))
    tiles = row_tiles * -(-x.tokens // config.tokens)
    clusters = tiles
    if config.split == 1:  # persistent: each cluster takes every clusters-th tile
        clusters = min(tiles, _multiprocessors(device) * config.ctas_per_sm // config.cluster)
    # int4 codes are stored as e4m3 numbers of code * 2**-9, on both sides in W4A4.
    unit_value = 2.0**9 if x.spec.normal == "e4m3" else 2.0**18
    _kernel(config, x.dtype, device).launch(
        clusters * config.cluster,
        (
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(x.codes.data_ptr()),
            ctypes.c_void_p(x.scales.data_ptr()),
            ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int(x.tokens),
            ctypes.c_int(x.codes.shape[1]),
            ctypes.c_int(channels),
            ctypes.c_int(layout.num_normal_groups),
            ctypes.c_int(layout.num_outlier_groups),
            ctypes.c_float(unit_value),
        ),
        overlap=overlap,
    )
    return y
