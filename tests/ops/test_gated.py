"""gated: the kernel against the reference, the reference against float64."""

import pytest
import torch

from quatom.errors import ShapeError
from quatom.ops.backend import Backend
from quatom.ops.gated import gated


def make_gate_up(tokens, channels, dtype):
    x = torch.randn(tokens, 2 * channels, generator=torch.Generator().manual_seed(1)) * 4
    x[0, :2] = torch.tensor([80.0, -80.0])  # exp overflows to infinity, silu must not
    return x.to(dtype)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (3, 1500), (2, 2048)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_matches_the_reference(tokens, channels, dtype, device):
    gate_up = make_gate_up(tokens, channels, dtype)
    want = gated(gate_up, "silu", True, backend=Backend.REFERENCE)
    got = gated(gate_up.to(device), "silu", True, backend=Backend.TRITON)
    # exp differs by ulps: silu may round to the next number, and so may the product.
    rtol = 2.0 * torch.finfo(dtype).eps if dtype is torch.float16 else 1e-6
    torch.testing.assert_close(got.cpu(), want, rtol=rtol, atol=1e-7)


def test_the_reference_is_silu_times_up():
    gate_up = make_gate_up(4, 96, torch.float32)
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = (gate / (1 + (-gate).exp()) * up).float()
    torch.testing.assert_close(gated(gate_up, "silu", True), want, rtol=1e-5, atol=1e-7)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 63\)"):
        gated(torch.zeros(2, 63), "silu", True)
