"""norm: the reference against transformers, the kernel against the reference."""

import pytest
import torch

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.ops.backend import Backend
from quatom.ops.norm import norm


def make(tokens, channels, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, channels, generator=rng).mul(3).to(dtype).unbind()
    weight = (1 + 0.3 * torch.randn(channels, generator=rng)).to(dtype)
    return x, residual, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight = make(9, 128, dtype)
    theirs = LlamaRMSNorm(128, eps=1e-5)
    theirs.weight.data = weight
    assert torch.equal(norm(x, weight, norm=Norm(eps=1e-5))[0], theirs(x))


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (5, 576), (2, 1000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_matches_the_reference(tokens, channels, dtype, has_residual, device):
    x, residual, weight = make(tokens, channels, dtype)
    residual = residual if has_residual else None
    want, want_total = norm(
        x, weight, norm=Norm(eps=1e-5), residual=residual, backend=Backend.REFERENCE
    )
    wide = torch.full((tokens, channels + 8), torch.nan, dtype=dtype)  # rows of a larger tensor
    wide[:, :channels] = x
    got, total = norm(
        wide.to(device)[:, :channels],
        weight.to(device),
        norm=Norm(eps=1e-5),
        residual=None if residual is None else residual.to(device),
        backend=Backend.TRITON,
    )
    assert torch.equal(total.cpu(), want_total)
    # The sum of squares adds up in another order: some ulps of float32, which may move the rounding
    # of a float16 value and, through it, that of the product, by one step each.
    rtol = 2.0 * torch.finfo(dtype).eps if dtype is torch.float16 else 1e-6
    torch.testing.assert_close(got.cpu(), want, rtol=rtol, atol=0)


def test_errors_name_the_shapes():
    with pytest.raises(ShapeError, match=r"got \(2, 64\) and \(32,\)"):
        norm(torch.zeros(2, 64), torch.ones(32), norm=Norm(eps=1e-5))
    with pytest.raises(ShapeError, match=r"\(2, 64\) torch.float32 like x; got \(1, 64\)"):
        norm(torch.zeros(2, 64), torch.ones(64), norm=Norm(eps=1e-5), residual=torch.zeros(1, 64))
