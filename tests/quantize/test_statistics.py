"""Moments of calibration inputs."""

import pytest
import torch

from quatom.loading import load
from quatom.modeling.rotary import RotaryTables
from quatom.quantize.measure import measure_moments
from quatom.quantize.statistics import MOMENT_ROWS, SecondMoments, observe, run_block


def moments(x, **options):
    sums = SecondMoments(**options)
    for batch in x.split(100):
        sums.add("o", batch)
    return sums.sums["o"]


def test_batches_add_up():
    x = torch.randn(250, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments(x), x.t() @ x, rtol=1e-5, atol=1e-4)


def _counted(forward, calls):
    def run(self, *arguments):
        calls.append(self)
        return forward(self, *arguments)

    return run


def test_mirrored_moments_are_those_of_the_whole_product():
    """Integers: float32 holds every sum exactly, in whatever order it was added up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 10, (250, 2 * MOMENT_ROWS + 40), generator=generator).float()
    found = moments(x)
    assert torch.equal(found, x.t() @ x)
    assert torch.equal(found, found.t())


def test_moments_multiply_no_last_linear(tiny_llama_dir, monkeypatch):
    """Nobody reads a block's output there; every input, the last linear's too, is still seen."""
    loaded = load(tiny_llama_dir, device="cpu")
    block, config = loaded.model.blocks[0], loaded.config
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, config.hidden_size, generator=generator)
    rotary = RotaryTables(config, 16, torch.device("cpu"))
    whole = SecondMoments()
    with observe(block, whole.add):
        output = run_block(block, hidden, rotary)
    down, calls = block.linears["down"], []
    monkeypatch.setattr(type(down), "forward", _counted(type(down).forward, calls))
    found, _ = measure_moments(block, hidden, rotary, tf32=False, bound=0)
    assert calls
    assert down not in calls
    assert found.keys() == whole.sums.keys() == set(block.plan.sites)
    for site, matrix in found.items():
        assert torch.equal(matrix, whole.sums[site])
    assert torch.equal(run_block(block, hidden, rotary), output)  # the linear is back
    assert down in calls


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
