"""gated_quantize: kernels against the reference, the reference against float64."""

from itertools import product

import pytest
import torch
from tests.covering import covering
from tests.ops.codes import assert_near

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec
from quatom.ops.backend import Backend
from quatom.ops.gated import ACTIVATIONS, gated
from quatom.ops.gated_quantize import gated_quantize
from quatom.ops.reorder_quantize import reorder_quantize

BACKENDS = [Backend.REFERENCE, Backend.TRITON]
FORMS = [(a, has_gate) for a in ACTIVATIONS for has_gate in (True, False)]
FORMS.remove(("clamped_swiglu", False))


def make_gate_up(tokens, channels, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * channels, generator=rng)
    x[:, ::41] *= 20.0
    return x.half()


SCHEMES = [("int4", "group"), ("int4", "multiples"), ("e4m3", "row"), ("int8", "row")]
INPUTS = [
    (1, GroupLayout(256, 128, 128)),
    (5, GroupLayout(512 + 96, 128, 64)),  # a short last group
    (2, GroupLayout(2688, 128, 128)),  # more groups than one program takes
]


@pytest.mark.parametrize(
    ("backend", "byte_layout", "scheme", "inputs"),
    [
        *((Backend.TRITON, *point) for point in covering(("rows", "groups"), SCHEMES, INPUTS)),
        *(
            pytest.param(Backend.CUDA, "groups", *point, marks=pytest.mark.gpu)
            for point in product(SCHEMES, INPUTS)
        ),
    ],
)
def test_kernels_match_the_reference(backend, byte_layout, scheme, inputs, device):
    (normal, scale_mode), (tokens, layout) = scheme, inputs
    gate_up = make_gate_up(tokens, layout.channels)
    spec = QuantizeSpec(
        layout=layout,
        normal=normal,
        clip_ratio=0.9,
        scale_mode=scale_mode,
        byte_layout=byte_layout,
    )
    got = gated_quantize(gate_up.to(device), spec, "silu", True, backend=backend)
    want = gated_quantize(gate_up, spec, "silu", True, backend=Backend.REFERENCE)
    assert_near(got, want, spec)  # exp differs by ulps of float32


SCALE_MODES = ("group", "multiples")


@pytest.mark.parametrize(
    ("backend", "byte_layout", "form", "scale_mode"),
    [
        *((Backend.TRITON, *point) for point in covering(("rows", "groups"), FORMS, SCALE_MODES)),
        *(
            pytest.param(Backend.CUDA, "groups", *point, marks=pytest.mark.gpu)
            for point in product(FORMS, SCALE_MODES)
        ),
    ],
)
def test_kernels_match_the_reference_for_every_activation(
    backend, byte_layout, form, scale_mode, device
):
    activation, has_gate = form
    layout = GroupLayout(512 + 96, 128, 64)
    x = make_gate_up(3, layout.channels)
    x = x if has_gate else x[:, : layout.channels]
    spec = QuantizeSpec(layout=layout, scale_mode=scale_mode, byte_layout=byte_layout)
    got = gated_quantize(x.to(device), spec, activation, has_gate, backend=backend)
    want = gated_quantize(x, spec, activation, has_gate, backend=Backend.REFERENCE)
    assert_near(got, want, spec)  # functions differ by ulps of float32


@pytest.mark.parametrize(("activation", "has_gate"), FORMS)
def test_the_reference_quantizes_what_gated_gives(activation, has_gate):
    x = make_gate_up(4, 128).float()
    layout = GroupLayout(x.shape[1] // (2 if has_gate else 1), 64)
    spec = QuantizeSpec(layout=layout, normal="int8")
    got = gated_quantize(x, spec, activation, has_gate)
    want = reorder_quantize(gated(x, activation, has_gate), None, spec)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales)


def test_the_reference_is_silu_times_up():
    layout = GroupLayout(128, 128)
    gate_up = make_gate_up(4, 128)
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = gate / (1 + (-gate).exp()) * up
    got = gated_quantize(
        gate_up, QuantizeSpec(layout=layout, normal="int8"), "silu", True
    ).dequantize()
    step = want.abs().amax(dim=1, keepdim=True) / 127
    assert ((got - want).abs() <= step * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_negative_gates_vanish_without_nan(backend, device):
    gate_up = torch.full((1, 128), -60000.0, dtype=torch.float16, device=device)
    spec = QuantizeSpec(layout=GroupLayout(64, 64))
    assert not gated_quantize(gate_up, spec, "silu", True, backend=backend).dequantize().any()


def test_the_error_names_the_numbers():
    spec = QuantizeSpec(layout=GroupLayout(64, 64))
    with pytest.raises(ShapeError, match=r"\(T, 128\), twice the layout's 64.*got \(2, 64\)"):
        gated_quantize(torch.zeros(2, 64), spec, "silu", True)
    with pytest.raises(ShapeError, match=r"\(T, 64\), the layout's 64.*got \(2, 128\)"):
        gated_quantize(torch.zeros(2, 128), spec, "relu", False)
