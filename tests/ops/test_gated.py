"""gated: the reference against float64, the kernel against the reference."""

import math

import pytest
import torch

from quatom.errors import ShapeError
from quatom.ops.backend import Backend
from quatom.ops.gated import ACTIVATIONS, gated

# Each written out in float64.
FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


def make_gate_up(tokens, channels, dtype=torch.float32):
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1)) * 4
    x[0, :2] = torch.tensor([80.0, -80.0])  # exp overflows to infinity, an activation must not
    return x.to(dtype)


def test_every_activation_is_tried():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_formula_in_float64(activation, has_gate, backend, device):
    gate_up = make_gate_up(4, 192)
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = FORMULAS[activation](gate) * up if has_gate else FORMULAS[activation](gate_up.double())
    got = gated(gate_up.to(device), activation, has_gate, backend=backend)
    # 1 + erf and 1 + tanh lose what is small beside 1, up to 2**-23 of an input below 16 or so.
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 128), (3, 3000), (2, 4096)])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_matches_the_reference(tokens, channels, activation, has_gate, dtype, device):
    gate_up = make_gate_up(tokens, channels, dtype)
    want = gated(gate_up, activation, has_gate, backend=Backend.REFERENCE)
    got = gated(gate_up.to(device), activation, has_gate, backend=Backend.TRITON)
    # Functions differ by ulps of float32: float16 may round to the next number.
    rtol = torch.finfo(dtype).eps if dtype is torch.float16 else 1e-5
    torch.testing.assert_close(got.cpu(), want, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_nothing_is_rounded_before_the_product(backend, device):
    gate_up = make_gate_up(64, 256, torch.float16).to(device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = FORMULAS["silu"](gate) * up
    got = gated(gate_up, "silu", True, backend=backend).double()
    # One rounding to float16 and ulps of float32; silu rounded first would miss by 2**-10.
    assert ((got - want).abs() <= want.abs() * 2.0**-11 * 1.01 + 2.0**-25).all()


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_a_relu_does_not_hide_nan(backend, device):
    x = torch.tensor([[torch.nan, -1.0, 2.0]], device=device)
    got = gated(x, "relu", False, backend=backend)
    assert got[0, 0].isnan()
    assert got[0, 1:].tolist() == [0.0, 2.0]


def test_errors_name_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"\(T, 2 I\), got \(2, 63\)"):
        gated(torch.zeros(2, 63), "silu", True)
    with pytest.raises(ShapeError, match="one of silu, gelu, gelu_tanh, relu, got 'swish'"):
        gated(torch.zeros(2, 64), "swish", True)
