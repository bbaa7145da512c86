"""Quantize operations that rotate their groups: every kernel against the reference."""

from itertools import product

import pytest
import torch
from tests.covering import covering

from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.cuda_quantize import quantize_cuda
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.norm_quantize import norm_quantize
from quatom.ops.quantize_variants import Variant
from quatom.ops.reorder_quantize import reorder_quantize

LAYOUTS = [
    GroupLayout(normal=512, group_size=128, outliers=64),  # SmolLM2's hidden size
    GroupLayout(normal=128 + 96, group_size=128, outliers=32),  # a short group of 3 x 32
]


def quantize(op, x, order, spec, backend):
    if op == "reorder":
        return reorder_quantize(x, order, spec, backend=backend)
    if op == "gated":
        return gated_quantize(torch.cat((x, x.flip(0)), dim=1), spec, "silu", True, backend=backend)
    weight = torch.linspace(0.5, 2.0, x.shape[1], device=x.device).to(x.dtype)
    return norm_quantize(x, weight, order, spec, norm=Norm(eps=1e-5), backend=backend)[0]


OPERATIONS = ("reorder", "norm", "gated")
SCHEMES = [("int4", "group"), ("int4", "multiples"), ("e4m3", "row"), ("int8", "row")]


# Values are rotated in one piece of code, in float32, before any is rounded.
@pytest.mark.parametrize(
    ("backend", "byte_layout", "op", "layout", "scheme"),
    [
        *(
            (Backend.TRITON, *point)
            for point in covering(("rows", "groups"), OPERATIONS, LAYOUTS, SCHEMES)
        ),
        *(
            pytest.param(Backend.CUDA, "groups", *point, marks=pytest.mark.gpu)
            for point in product(OPERATIONS, LAYOUTS, SCHEMES)
        ),
    ],
)
def test_kernel_matches_reference(backend, byte_layout, op, layout, scheme, device):
    normal, scale_mode = scheme
    rng = torch.Generator().manual_seed(3)
    gain = torch.rand(layout.channels, generator=rng).exp() ** 2
    x = (torch.randn(3, layout.channels, generator=rng) * gain).to(device)
    if backend is Backend.CUDA:
        x = x.half()
    order = torch.randperm(layout.channels, generator=rng).int().to(device)
    spec = QuantizeSpec(
        layout=layout,
        normal=normal,
        rotate=True,
        scale_mode=scale_mode,
        byte_layout=byte_layout,
        clip_ratio=0.95,
    )
    want, want_scales = quantize(op, x, order, spec, Backend.REFERENCE).canonical()
    got, got_scales = quantize(op, x, order, spec, backend).canonical()
    # Butterflies and a matrix product sum in another order: a scale may round to its neighbour,
    # 2**-10 away, and a value may cross a rounding boundary to the next code.
    torch.testing.assert_close(got_scales, want_scales, rtol=2**-10, atol=0)
    step = 32.0 if normal == "e4m3" else 1.0  # distance of e4m3 numbers near 448
    if scale_mode == "multiples" and byte_layout == "groups":
        step = 16.0  # a code of the largest multiple, or a multiple of the largest code
    assert (got - want).abs().max() <= step
    assert (got != want).float().mean() <= 2e-3


def test_a_spike_inside_a_group_costs_less_when_it_is_rotated():
    layout = GroupLayout(normal=128, group_size=128)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 40.0
    errors = {}
    for rotate in (False, True):
        spec = QuantizeSpec(layout=layout, rotate=rotate)
        quantized = reorder_quantize(x, None, spec, backend=Backend.REFERENCE).dequantize()
        if rotate:  # back to the channels: a rotation is its own inverse
            from quatom.numerics.hadamard import rotate_groups

            quantized = rotate_groups(quantized, layout)
        errors[rotate] = float((quantized - x).norm() / x.norm())
    # Without, a step of 40 / 7 rounds all other values to zero.
    assert errors[True] < 0.6 * errors[False]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("normal", "scale_mode"),
    [("int4", "group"), ("int4", "multiples"), ("e4m3", "row"), ("int8", "row")],
)
@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        GroupLayout(normal=160, group_size=64, outliers=96, outlier_blocks=3),
        GroupLayout(normal=192, group_size=96),  # blocks of 32
        GroupLayout(normal=3968, group_size=128, outliers=128),
    ],
)
def test_cuda_rotates_as_triton_does_bit_for_bit(layout, normal, scale_mode):
    """Both add and subtract the same channels in the same order."""
    rng = torch.Generator().manual_seed(7)
    x = (torch.randn(5, layout.channels, generator=rng) * 3).half().cuda()
    order = torch.randperm(layout.channels, generator=rng).int().cuda()
    spec = QuantizeSpec(
        layout=layout,
        normal=normal,
        rotate=True,
        scale_mode=scale_mode,
        byte_layout="groups",
        clip_ratio=0.9,
    )
    want = reorder_quantize(x, order, spec, backend=Backend.TRITON)
    for variant in (Variant(128, 1), Variant(128, 2)):
        got, _ = quantize_cuda("reorder", x, spec, order=order, variant=variant)
        assert torch.equal(got.canonical()[0], want.canonical()[0])
        assert torch.equal(got.canonical()[1], want.canonical()[1])
