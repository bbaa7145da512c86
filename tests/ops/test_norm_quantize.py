"""norm_quantize: kernels against the reference, the reference against its properties."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.covering import covering
from tests.ops.codes import assert_near

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.experts import ExpertSum, group_tokens
from quatom.ops.norm import norm as plain_norm
from quatom.ops.norm_quantize import norm_quantize
from quatom.ops.reorder_quantize import reorder_quantize

BACKENDS = [Backend.REFERENCE, Backend.TRITON]
CUDA_KERNEL = (Backend.CUDA, "groups")
KERNELS = [
    (Backend.TRITON, "rows"),
    (Backend.TRITON, "groups"),
    pytest.param(*CUDA_KERNEL, marks=pytest.mark.gpu),
]


def make_inputs(tokens, channels, *, seed=0, dtype=torch.float16):
    """Rows with a few large channels, as in a trained model."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=rng)
    x[:, ::37] *= 30.0
    weight = 1 + 0.1 * torch.randn(channels, generator=rng)
    order = torch.randperm(channels, generator=rng).int()
    residual = torch.randn(tokens, channels, generator=rng)
    return x.to(dtype), weight.to(dtype), order, residual.to(dtype)


INPUTS = [
    (1, GroupLayout(256, 128, 128), torch.float16),  # single-token decode
    (3, GroupLayout(512, 128, 64), torch.float16),  # SmolLM2: 576 channels, no power of two
    (9, GroupLayout(864, 128, 32), torch.float16),  # Qwen2.5: 896 channels, a short last group
]
GPU_INPUTS = [
    *INPUTS,
    # Triton's interpreter truncates to bfloat16, the GPU rounds.
    (2, GroupLayout(256, 128), torch.bfloat16),
    (70, GroupLayout(3968, 128, 128), torch.bfloat16),
    (3, GroupLayout(8064, 128, 128), torch.float16),
]
SCHEMES = [("int4", "group"), ("int4", "multiples"), ("e4m3", "row"), ("int8", "row")]
# Which channels there are, and whether something is added to them.
READS = [("all", True), ("some", True), ("in place", False)]


# What a program reads and what it writes are apart in the kernel.
@pytest.mark.parametrize(
    ("backend", "byte_layout", "scheme", "inputs", "reads"),
    [
        *(
            (Backend.TRITON, *point)
            for point in covering(("rows", "groups"), SCHEMES, INPUTS, READS)
        ),
        *(
            pytest.param(*kernel, *point, marks=pytest.mark.gpu)
            for kernel in [(Backend.TRITON, "rows"), (Backend.TRITON, "groups"), CUDA_KERNEL]
            for point in product(SCHEMES, GPU_INPUTS, READS)
        ),
    ],
)
def test_kernels_match_the_reference(backend, byte_layout, scheme, inputs, reads, device):
    (normal, scale_mode), (tokens, layout, dtype), (channels, has_residual) = scheme, inputs, reads
    x, weight, order, residual = make_inputs(tokens, layout.channels, dtype=dtype)
    spec = QuantizeSpec(
        layout=layout,
        normal=normal,
        clip_ratio=0.9,
        scale_mode=scale_mode,
        byte_layout=byte_layout,
    )
    if channels == "some":  # several times, others never
        order = order[torch.arange(len(order)) // 3 * 2]
    reorder, add = None if channels == "in place" else order, residual if has_residual else None
    on = [None if t is None else t.to(device) for t in (x, weight, reorder, add)]
    got, total = norm_quantize(*on[:3], spec, norm=Norm(eps=1e-5), residual=on[3], backend=backend)
    want, want_total = norm_quantize(
        x, weight, reorder, spec, norm=Norm(eps=1e-5), residual=add, backend=Backend.REFERENCE
    )
    assert torch.equal(total.cpu(), want_total)
    assert_near(got, want, spec)  # squares are summed in another order


NORMS = {
    "rms of 1 + w": Norm(eps=1e-5, weight_offset=1.0),
    "layer": Norm(eps=1e-5, kind="layer"),
    "layer with a bias": Norm(eps=1e-5, kind="layer", bias=True),
}


@pytest.mark.parametrize(("backend", "byte_layout"), KERNELS)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("tokens", [3, pytest.param(600, marks=pytest.mark.gpu)])
def test_kernels_match_the_reference_for_every_norm(norm, tokens, backend, byte_layout, device):
    layout = GroupLayout(512 + 96, 128, 64)
    x, weight, order, residual = make_inputs(tokens, layout.channels)
    bias = weight.flip(0) - 1 if norm.bias else None
    spec = QuantizeSpec(layout=layout, byte_layout=byte_layout, rotate=True)
    for reorder, add in ((order, residual), (None, None)):
        given = {"bias": bias, "residual": add}
        on = {name: None if t is None else t.to(device) for name, t in given.items()}
        got, total = norm_quantize(
            x.to(device),
            weight.to(device),
            None if reorder is None else reorder.to(device),
            spec,
            norm=norm,
            **on,
            backend=backend,
        )
        want, want_total = norm_quantize(
            x, weight, reorder, spec, norm=norm, **given, backend=Backend.REFERENCE
        )
        assert torch.equal(total.cpu(), want_total)
        assert_near(got, want, spec, most=2e-3)  # butterflies sum in another order, too


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_reference_quantizes_what_the_norm_gives(norm):
    x, weight, order, residual = make_inputs(4, 256, dtype=torch.float32)
    bias = weight.flip(0) if norm.bias else None
    given = {"norm": norm, "bias": bias, "residual": residual}
    spec = QuantizeSpec(layout=GroupLayout(192, 64, 64))
    quantized, total = norm_quantize(x, weight, order, spec, **given)
    normed, want_total = plain_norm(x, weight, **given)
    assert torch.equal(total, want_total)
    want = reorder_quantize(normed, order, spec)
    assert torch.equal(quantized.codes, want.codes)
    assert torch.equal(quantized.scales, want.scales)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 4))
def test_the_error_is_at_most_half_a_step_without_clipping(seed, tokens):
    layout = GroupLayout(384, 128, 128)
    x, weight, order, residual = make_inputs(tokens, 512, seed=seed)
    quantized, total = norm_quantize(
        x, weight, order, QuantizeSpec(layout=layout), norm=Norm(eps=1e-6), residual=residual
    )
    assert torch.equal(total, x + residual)
    real = total.double()
    normed = real * torch.rsqrt(real.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    error = (quantized.dequantize() - normed[:, order.long()]).abs()
    step = quantized.scales.repeat_interleave(128, dim=1)
    # The scale itself is rounded to float16, so the extreme code may miss by 127 * 2**-11 steps.
    assert (error <= step * (0.5 + 127 * 2**-11)).all()


@given(exponent=st.integers(-4, 4))
@settings(deadline=None, max_examples=9)
def test_scaling_a_token_by_a_power_of_two_changes_nothing(exponent):
    layout = GroupLayout(384, 128, 128)
    x, weight, order, _ = make_inputs(2, 512)
    spec = QuantizeSpec(layout=layout)
    base, _ = norm_quantize(x, weight, order, spec, norm=Norm(eps=1e-30))
    scaled, _ = norm_quantize(x * 2.0**exponent, weight, order, spec, norm=Norm(eps=1e-30))
    assert torch.equal(base.codes, scaled.codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_inside_the_root(backend, device):
    # eps completes the mean square to 64 and weight is 8: the row passes through unchanged.
    x = torch.zeros(1, 128, dtype=torch.float16, device=device)
    x[0, :7] = torch.tensor([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    eps = 64.0 - x.float().square().mean().item()
    weight = torch.full((128,), 8.0, dtype=torch.float16, device=device)
    spec = QuantizeSpec(layout=GroupLayout(128, 128))
    got, total = norm_quantize(x, weight, None, spec, norm=Norm(eps=eps), backend=backend)
    assert got.codes[0, :7].tolist() == [7, 0, 2, 2, 0, -2, -2]
    assert total is x


def test_a_zero_token_stays_zero_and_finite():
    _, weight, order, _ = make_inputs(2, 256)
    spec = QuantizeSpec(layout=GroupLayout(128, 128, 128))
    quantized, _ = norm_quantize(
        torch.zeros(2, 256), weight.float(), order, spec, norm=Norm(eps=1e-6)
    )
    assert not quantized.dequantize().any()
    assert quantized.scales.isfinite().all()


def test_errors_name_the_numbers():
    x, weight, order, residual = make_inputs(2, 256)
    spec = QuantizeSpec(layout=GroupLayout(128, 128, 128))
    with pytest.raises(ShapeError, match=r"weight \(256,\).*got \(2, 256\) and \(255,\)"):
        norm_quantize(x, weight[:255], order, spec, norm=Norm(eps=1e-6))
    with pytest.raises(ShapeError, match=r"order \(256,\); got \(3,\)"):
        norm_quantize(x, weight, order[:3], spec, norm=Norm(eps=1e-6))
    with pytest.raises(ShapeError, match=r"residual \(2, 256\) torch.float16.*torch.float32"):
        norm_quantize(x, weight, order, spec, norm=Norm(eps=1e-6), residual=residual.float())
    with pytest.raises(ShapeError, match="the norm has a bias, the call none"):
        norm_quantize(x, weight, order, spec, norm=NORMS["layer with a bias"])


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param(None, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", [Norm(eps=1e-5), Norm(eps=1e-5, weight_offset=1.0)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "layout"),
    [
        (1, 1, GroupLayout(512, 128, 64)),
        (5, 2, GroupLayout(864, 128, 32)),
        (3, 9, GroupLayout(256, 128)),  # more than a kernel adds up
        pytest.param(64, 8, GroupLayout(1920, 128, 128), marks=pytest.mark.gpu),
        pytest.param(1025, 8, GroupLayout(1920, 128, 128), marks=pytest.mark.gpu),
        pytest.param(700, 2, GroupLayout(3968, 128, 128), marks=pytest.mark.gpu),
        pytest.param(700, 4, GroupLayout(2816, 128, 64), marks=pytest.mark.gpu),
    ],
)
def test_results_of_experts_are_added_up_as_combine_does(tokens, k, layout, norm, backend, device):
    rng = torch.Generator().manual_seed(tokens)
    _, weight, order, residual = make_inputs(tokens, layout.channels)
    y = torch.randn(tokens * k, layout.channels, generator=rng).mul_(3).half()
    ids = torch.rand(tokens, 16, generator=rng).topk(k).indices.int()
    shares = torch.rand(tokens, k, generator=rng)
    y, ids, shares, weight, order, residual = (
        t.to(device) for t in (y, ids, shares, weight, order, residual)
    )
    mixed = ExpertSum(y, group_tokens(ids, 16), shares)
    spec = QuantizeSpec(
        layout=layout,
        normal="int8",
        scale_mode="row",
        byte_layout="rows" if backend is Backend.REFERENCE else "groups",
    )
    for add in (residual, None):
        options = dict(norm=norm, residual=add, backend=backend)
        got, total = norm_quantize(mixed, weight, order, spec, **options)
        want, want_total = norm_quantize(mixed.combine(), weight, order, spec, **options)
        assert torch.equal(total, want_total)
        for ours, theirs in zip(got.canonical(), want.canonical(), strict=True):
            assert torch.equal(ours, theirs)
