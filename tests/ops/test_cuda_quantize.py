"""quantize.cu: every variant of every operation against the reference; who may call it."""

from itertools import product

import pytest
import torch

from quatom.errors import BackendError
from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout
from quatom.ops import cuda_quantize
from quatom.ops.activations import QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.cuda_quantize import can_quantize, quantize_cuda
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.norm_quantize import norm_quantize
from quatom.ops.quantize_variants import Variant, choose_variant
from quatom.ops.reorder_quantize import reorder_quantize

LAYOUTS = {
    "SmolLM2": GroupLayout(512, 128, 64),
    "short last group": GroupLayout(4096 - 32, 128, 32),
    "small groups": GroupLayout(1024 - 96, 32, 96, 3),  # 32 groups: several rounds
    "no outliers": GroupLayout(1152, 128),
    "Llama-2-70B": GroupLayout(8192 - 128, 128, 128),
}


def variants(layout):
    """Whatever `choose_variant` may return, and smaller and larger CTAs."""
    chosen = {
        choose_variant("reorder", tokens, layout, whole_token)
        for tokens in (1, 4096)
        for whole_token in (False, True)
    }
    return chosen | {Variant(128, 1), Variant(1024, 1), Variant(96, 2), Variant(512, 2)}


def make_inputs(tokens, channels, dtype, seed=0):
    """Rows with a few large channels, a residual, a norm's weight and an order; on the CPU."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=rng)
    x[:, ::37] *= 30.0
    residual = torch.randn(tokens, channels, generator=rng)
    weight = 1 + 0.1 * torch.randn(channels, generator=rng)
    order = torch.randperm(channels, generator=rng).int()
    return x.to(dtype), residual.to(dtype), weight.to(dtype), order


@pytest.fixture
def poisoned():
    """Fill what torch allocates with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("normal", "scale_mode"),
    [
        ("int4", "group"),
        ("int3", "group"),
        ("e4m3", "group"),
        ("int4", "row"),
        ("int8", "row"),
        ("int4", "multiples"),
        ("int3", "multiples"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_variant_reorders_as_the_reference_does(layout, normal, scale_mode, poisoned):
    for tokens, dtype in ((1, torch.float16), (7, torch.bfloat16)):
        x, _, _, order = make_inputs(tokens, layout.channels, dtype)
        spec = QuantizeSpec(
            layout=layout,
            normal=normal,
            clip_ratio=0.9,
            scale_mode=scale_mode,
            byte_layout="groups",
        )
        for used in (order, None):
            want = reorder_quantize(x, used, spec, backend=Backend.REFERENCE)
            on_device = None if used is None else used.cuda()
            for variant in variants(layout):
                got, _ = quantize_cuda("reorder", x.cuda(), spec, order=on_device, variant=variant)
                assert torch.equal(got.canonical()[0].cpu(), want.canonical()[0]), variant
                assert torch.equal(got.canonical()[1].cpu(), want.canonical()[1]), variant
                # Sums of e4m3 codes are rounded; those of integers are exact.
                torch.testing.assert_close(
                    got.corrections().cpu(), want.corrections(), rtol=1e-5, atol=1e-9
                )


@pytest.mark.gpu
@pytest.mark.parametrize("scale_mode", ["group", "row", "multiples"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_variant_normalizes_as_the_reference_does(layout, scale_mode, poisoned):
    for tokens, dtype in ((1, torch.bfloat16), (9, torch.float16)):
        x, residual, weight, order = make_inputs(tokens, layout.channels, dtype)
        spec = QuantizeSpec(
            layout=layout, clip_ratio=0.9, scale_mode=scale_mode, byte_layout="groups"
        )
        for add, used in ((residual, order), (None, None)):
            want, want_total = norm_quantize(
                x, weight, used, spec, norm=Norm(eps=1e-5), residual=add, backend=Backend.REFERENCE
            )
            for variant in variants(layout):
                got, total = quantize_cuda(
                    "norm",
                    x.cuda(),
                    spec,
                    order=None if used is None else used.cuda(),
                    weight=weight.cuda(),
                    residual=None if add is None else add.cuda(),
                    norm=Norm(eps=1e-5),
                    variant=variant,
                )
                assert torch.equal(total.cpu(), want_total), variant
                (codes, scales), (want_codes, want_scales) = got.canonical(), want.canonical()
                # Squares are summed in another order: a scale may differ by one float16 step, and
                # a code next to a tie by one.
                torch.testing.assert_close(scales.cpu(), want_scales, rtol=2**-10, atol=0)
                difference = (codes.cpu() - want_codes).abs()
                # Of multiples, by a code of the largest or by a multiple of the largest code.
                assert difference.max() <= (16 if scale_mode == "multiples" else 1), variant
                assert (difference != 0).float().mean() <= 1e-3, variant


NORMS = {
    "rms of 1 + w": Norm(eps=1e-5, weight_offset=1.0),
    "layer": Norm(eps=1e-5, kind="layer"),
    "layer with a bias": Norm(eps=1e-5, kind="layer", bias=True),
    "layer of 1 + w with a bias": Norm(eps=1e-5, kind="layer", weight_offset=1.0, bias=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_variant_knows_every_norm(layout, norm, poisoned):
    for tokens, dtype in ((1, torch.bfloat16), (9, torch.float16)):
        x, residual, weight, order = make_inputs(tokens, layout.channels, dtype)
        x += 3.0  # a mean to subtract
        bias = residual[0].contiguous() if norm.bias else None
        spec = QuantizeSpec(layout=layout, byte_layout="groups")
        for add, used in ((residual, order), (None, None)):
            want, _ = norm_quantize(
                x, weight, used, spec, norm=norm, bias=bias, residual=add, backend="reference"
            )
            for variant in variants(layout):
                got, _ = quantize_cuda(
                    "norm",
                    x.cuda(),
                    spec,
                    order=None if used is None else used.cuda(),
                    weight=weight.cuda(),
                    bias=None if bias is None else bias.cuda(),
                    residual=None if add is None else add.cuda(),
                    norm=norm,
                    variant=variant,
                )
                (codes, scales), (want_codes, want_scales) = got.canonical(), want.canonical()
                # As above.
                torch.testing.assert_close(scales.cpu(), want_scales, rtol=2**-10, atol=0)
                difference = (codes.cpu() - want_codes).abs()
                assert difference.max() <= 1, variant
                assert (difference != 0).float().mean() <= 1e-3, variant


@pytest.mark.parametrize(
    ("tokens", "variant"),
    [
        (16, Variant(224, 1, 8)),
        (17, Variant(896, 1, 2)),
        (64, Variant(896, 1, 2)),
        (128, Variant(896, 1, 2)),
        (129, Variant(448, 1)),
    ],
)
def test_ctas_that_share_a_token_are_as_many_as_were_fastest(tokens, variant):
    """SiLU of Llama-3-8B, whose groups share a scale; docs/lab/kernels-linear.md."""
    assert choose_variant("gated", tokens, GroupLayout(14208, 128, 128), True) == variant


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_silu_with_a_whole_token_takes_whole_tokens(layout, poisoned):
    x, other, _, _ = make_inputs(5, layout.channels, torch.float16)
    gate_up = torch.cat((x, other), dim=1)
    spec = QuantizeSpec(layout=layout, normal="int8", scale_mode="row", byte_layout="groups")
    want = gated_quantize(gate_up, spec, "silu", True, backend=Backend.REFERENCE).canonical()
    eighth = -(-layout.num_scales // 8)
    chosen = {choose_variant("gated", tokens, layout, True) for tokens in (5, 64)}
    for variant in chosen | {Variant(128, 1, eighth), Variant(64, 1, 3), Variant(512, 1, 2)}:
        got = quantize_cuda("gated", gate_up.cuda(), spec, variant=variant)[0].canonical()
        # exp differs by ulps: a scale by one float16 step, and codes next to a tie by one.
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=2**-10, atol=0)
        difference = (got[0].cpu() - want[0]).abs()
        assert (difference <= want[0].abs().clamp(min=8) / 8).all(), variant
        assert (difference != 0).float().mean() <= 1e-3, variant


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 700])
def test_a_chain_in_a_graph_equals_the_same_calls_one_by_one(tokens):
    """Each kernel starts while the one before it ends, and must wait for its results."""
    layout = LAYOUTS["SmolLM2"]
    x, residual, weight, order = (
        t.cuda() for t in make_inputs(tokens, layout.channels, torch.bfloat16)
    )
    spec = QuantizeSpec(layout=layout, byte_layout="groups")

    def chain(wait):
        total, codes = residual, []
        for step in range(12):
            quantized, total = norm_quantize(
                x, weight, order, spec, norm=Norm(eps=1e-5), residual=total, backend=Backend.CUDA
            )
            codes += [quantized.codes[:, :tokens].clone()] if step % 4 == 3 else []
            codes += [reorder_quantize(total, order, spec, backend=Backend.CUDA).codes]
            if wait:
                torch.cuda.synchronize()
        return [c[:, :tokens] for c in codes]

    want = [c.clone() for c in chain(wait=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(wait=False)
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


@pytest.mark.gpu
def test_a_wide_row_of_two_tokens_fits_shared_memory():
    layout = GroupLayout(16384 - 128, 128, 128)  # Llama-3-405B
    x, residual, weight, order = (t.cuda() for t in make_inputs(600, 16384, torch.bfloat16))
    spec = QuantizeSpec(layout=layout, byte_layout="groups")
    options = {"norm": Norm(eps=1e-5), "residual": residual}
    got, _ = norm_quantize(x, weight, order, spec, **options, backend=Backend.CUDA)
    want, _ = norm_quantize(x, weight, order, spec, **options, backend=Backend.TRITON)
    assert (got.canonical()[0] != want.canonical()[0]).float().mean() <= 1e-3


@pytest.mark.gpu
def test_an_infinite_channel_shows():
    """A group that cannot be quantized must not come back as finite numbers."""
    x = torch.ones(2, 128, dtype=torch.float16, device="cuda")
    x[1, 3] = torch.inf
    spec = QuantizeSpec(layout=GroupLayout(128, 128), byte_layout="groups")
    for variant in (Variant(64, 1), Variant(64, 2)):
        scales = quantize_cuda("reorder", x, spec, variant=variant)[0].canonical()[1]
        assert scales[0].isfinite().all()
        assert scales[1].isinf().all()


def test_variants_cover_a_row():
    for layout in LAYOUTS.values():
        for operation in ("reorder", "norm", "gated"):
            for tokens, whole_token in product((1, 64, 4096), (False, True)):
                variant = choose_variant(operation, tokens, layout, whole_token)
                assert variant.threads % 32 == 0
                assert 32 <= variant.threads <= 1024
                assert variant.tokens in ((1,) if operation == "gated" else (1, 2))
                assert variant.ctas <= 8 or not whole_token  # a cluster


def test_what_the_kernel_cannot_do_is_said(monkeypatch):
    spec = QuantizeSpec(layout=GroupLayout(128, 128), byte_layout="groups")
    with pytest.raises(BackendError, match=r"the input is on cpu; use backend 'triton'"):
        quantize_cuda("reorder", torch.zeros(1, 128, dtype=torch.float16), spec)

    class OnHopper:
        device = torch.device("cuda")
        dtype = torch.bfloat16

    monkeypatch.setattr(cuda_quantize, "device_capability", lambda device: (9, 0))
    assert can_quantize(OnHopper, spec)
    rows = QuantizeSpec(layout=GroupLayout(128, 128))
    with pytest.raises(BackendError, match=r"layout 'groups', not 'rows'"):
        quantize_cuda("reorder", OnHopper, rows)
    tiny = QuantizeSpec(layout=GroupLayout(128, 128), byte_layout="groups", clip_ratio=1e-4)
    with pytest.raises(BackendError, match=r"overflow below clip_ratio 2\*\*-11: 0.0001"):
        quantize_cuda("reorder", OnHopper, tiny)
    uneven = QuantizeSpec(layout=GroupLayout(120, 100), byte_layout="groups")
    with pytest.raises(BackendError, match=r"these groups are \(100, 20\)"):
        quantize_cuda("reorder", OnHopper, uneven)
    half = Norm(eps=1e-5, weight_offset=0.5)
    with pytest.raises(BackendError, match=r"adds 0 or 1 to a norm's weight, not 0.5"):
        quantize_cuda("norm", OnHopper, spec, norm=half)
    assert not can_quantize(OnHopper, spec, half)
    assert not can_quantize(OnHopper, spec, NORMS["layer with a bias"], bias=torch.zeros(128))
    monkeypatch.setattr(cuda_quantize, "device_capability", lambda device: (8, 6))
    with pytest.raises(BackendError, match=r"needs compute capability 9.x, .* has \(8, 6\)"):
        quantize_cuda("reorder", OnHopper, spec)


@pytest.mark.gpu
def test_a_weight_of_another_dtype_is_not_rounded():
    x, _, weight, order = (t.cuda() for t in make_inputs(3, 1152, torch.bfloat16))
    spec = QuantizeSpec(layout=LAYOUTS["no outliers"], byte_layout="groups")
    wide = weight.float() * (1 + 2**-10)
    with pytest.raises(BackendError, match=r"weight torch.float32 .* x torch.bfloat16"):
        norm_quantize(x, wide, order, spec, norm=Norm(eps=1e-5), backend=Backend.CUDA)
    got, _ = norm_quantize(x, wide, order, spec, norm=Norm(eps=1e-5))
    want, _ = norm_quantize(x, wide, order, spec, norm=Norm(eps=1e-5), backend=Backend.TRITON)
    assert torch.equal(got.canonical()[0], want.canonical()[0])
