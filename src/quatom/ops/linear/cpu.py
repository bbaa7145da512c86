"""`linear` on a CPU: exact int8 products of whole groups, scaled and added group by group.

Integer dot products are exact whatever order a library adds them in, and groups are added in
order, so a row's result does not depend on the rows beside it. Codes take one byte a weight, a
quarter of what the reference holds, and a decode reads them all: int8 products are 4 to 5 times
faster here than float32 ones.
"""

import torch
from torch import Tensor

from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor

ROWS_AT_ONCE = 32
"""Few tokens multiply several groups in one product, each in rows that are zero elsewhere. That
multiplies zeros too, but a product of less than about this many rows waits for the weights."""


def cpu_obstacle(values: Tensor, formats: tuple[str, ...]) -> str | None:
    """Why this backend cannot run weights `values` in these formats, or None if it can."""
    if values.device.type != "cpu":
        return f"it runs on a CPU, the weights are on {values.device}"
    if not torch.cpu._is_vnni_supported():
        # Without these instructions oneDNN adds pairs of products in 16 bits, which saturate.
        return "it needs a CPU with AVX-512 VNNI for exact int8 products"
    wrong = [name for name in formats if not name.startswith("int")]
    if wrong:
        return f"it multiplies integers of at most 8 bits, not {' and '.join(wrong)}"
    return None


def prepare_cpu(values: Tensor, scales: Tensor, layout: GroupLayout) -> tuple[Tensor, ...]:
    """Codes (N, K) int8, scales (S, N) float32, and which channels a group has, (S, K) int8."""
    sizes = torch.tensor(layout.group_sizes)
    group_of = torch.arange(layout.num_scales).repeat_interleave(sizes)
    member = group_of == torch.arange(layout.num_scales)[:, None]
    return values.to(torch.int8).contiguous(), scales.float().t().contiguous(), member.char()


def linear_cpu(x: MixedTensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """See `linear`; x has integer codes in the `rows` layout."""
    weight, weight_scales, member = tensors
    if not x.tokens:
        return weight.new_empty((0, weight.shape[0]), dtype=x.dtype)
    sizes = x.spec.layout.group_sizes
    together = max(1, ROWS_AT_ONCE // max(1, x.tokens))
    total: Tensor | None = None
    start = 0
    for first in range(0, len(sizes), together):
        last = min(first + together, len(sizes))
        stop = start + sum(sizes[first:last])
        rows = x.codes[:, start:stop]
        if last - first > 1:
            rows = (rows.unsqueeze(1) * member[first:last, start:stop]).flatten(0, 1)
        dots = torch._int_mm(rows, weight[:, start:stop].t())  # (T * groups, N) int32
        parts = dots.view(x.tokens, last - first, -1).float().mul_(weight_scales[first:last])
        parts *= x.scales[:, first:last].unsqueeze(2)
        for part in parts.unbind(1):
            total = part if total is None else total.add_(part)
        start = stop
    assert total is not None  # a layout has at least one group
    return (total if bias is None else total + bias).to(x.dtype)
