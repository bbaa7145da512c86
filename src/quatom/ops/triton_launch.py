"""Dependent launch of Triton kernels: one starts while the kernel before it still runs.

Hopper and later. Between kernels that do not take part, the GPU is idle for a microsecond.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quatom.ops.cuda_build import device_capability


@triton.jit
def wait_for_the_kernel_before(launch_pdl: tl.constexpr):
    """First of all in a kernel that is launched with `launch_pdl`: all it reads may be results.

    The next kernel may start as soon as all programs of this one have: it waits in its turn.
    """
    if launch_pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlaps(x: Tensor) -> bool:
    """The `launch_pdl` of a kernel that runs on the device of x: a constant, and an option."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return device_capability(x.device.index)[0] >= 9
