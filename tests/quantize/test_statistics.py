"""Moments of calibration inputs."""

import pytest
import torch

from quatom.quantize.statistics import SecondMoments


def moments(x, **options):
    sums = SecondMoments(**options)
    for batch in x.split(100):
        sums.add("o", batch)
    return sums.sums["o"]


def test_batches_add_up():
    x = torch.randn(250, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments(x), x.t() @ x, rtol=1e-5, atol=1e-4)


def test_tf32_is_left_as_it_was():
    before = torch.backends.cuda.matmul.fp32_precision
    moments(torch.ones(4, 4), tf32=True)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_tf32_moments_are_near_and_positive_semidefinite():
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0)).cuda()
    x *= torch.logspace(-2, 2, 256, device="cuda")
    exact, fast = moments(x).double(), moments(x, tf32=True).double()
    assert not torch.equal(exact, fast)
    # Inputs round by 2**-11 at most, so a product of two by 2**-10.
    scale = exact.diagonal().sqrt()
    assert ((fast - exact).abs() <= 2**-10 * scale[:, None] * scale).all()
    assert torch.linalg.eigvalsh(fast / scale[:, None] / scale).min() > -1e-3
