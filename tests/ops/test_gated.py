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
    "clamped_swiglu": lambda x: x.clamp(max=7) / (1 + (-1.702 * x.clamp(max=7)).exp()),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
FORMS = [(a, has_gate) for a in ACTIVATIONS for has_gate in (True, False)]
FORMS.remove(("clamped_swiglu", False))


def formula(activation, x, has_gate):
    """The operation in float64."""
    x = x.double()
    if not has_gate:
        return FORMULAS[activation](x)
    gate, up = x.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        up = up.clamp(-7, 7) + 1
    return FORMULAS[activation](gate) * up


def make_gate_up(tokens, channels, dtype=torch.float32):
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1)) * 4
    x[0, :2] = torch.tensor([80.0, -80.0])  # exp overflows to infinity, an activation must not
    return x.to(dtype)


def test_every_activation_is_tried():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize(("activation", "has_gate"), FORMS)
def test_the_formula_in_float64(activation, has_gate, backend, device):
    gate_up = make_gate_up(4, 192)
    want = formula(activation, gate_up, has_gate)
    got = gated(gate_up.to(device), activation, has_gate, backend=backend)
    # 1 + erf and 1 + tanh lose what is small beside 1, up to 2**-23 of an input below 16 or so.
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 128), (3, 3000), (2, 4096)])
@pytest.mark.parametrize(("activation", "has_gate"), FORMS)
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
def test_clamped_swiglu_is_that_of_gpt_oss(backend, device):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = pytest.importorskip("transformers").GptOssConfig(
        hidden_size=8, intermediate_size=96, num_local_experts=1
    )
    gate_up = make_gate_up(4, 192)
    gate_up[1, 5], gate_up[1, 100] = torch.nan, torch.nan
    interleaved = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(1)
    want = gpt_oss.GptOssExperts(config)._apply_gate(interleaved)
    got = gated(gate_up.to(device), "clamped_swiglu", True, backend=backend).cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert want.isnan().sum() == 2


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize(("activation", "of_three"), [("relu", 3.0), ("relu2", 9.0)])
def test_a_relu_does_not_hide_nan(activation, of_three, backend, device):
    x = torch.tensor([[torch.nan, -1.0, 3.0]], device=device)
    got = gated(x, activation, False, backend=backend)
    assert got[0, 0].isnan()
    assert got[0, 1:].tolist() == [0.0, of_three]


def test_errors_name_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"\(T, 2 I\), got \(2, 63\)"):
        gated(torch.zeros(2, 63), "silu", True)
    with pytest.raises(ShapeError, match=r"one of silu, gelu, gelu_tanh, relu, .*got 'swish'"):
        gated(torch.zeros(2, 64), "swish", True)
    with pytest.raises(ShapeError, match="clamped_swiglu needs gates"):
        gated(torch.zeros(2, 64), "clamped_swiglu", False)
