"""norm: the reference against transformers and float64, the kernel against the reference."""

import pytest
import torch

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.ops.backend import Backend
from quatom.ops.norm import norm

NORMS = {
    "rms": Norm(eps=1e-5),
    "rms of 1 + w": Norm(eps=1e-5, weight_offset=1.0),
    "layer": Norm(eps=1e-5, kind="layer"),
    "layer with a bias": Norm(eps=1e-5, kind="layer", bias=True),
    "layer of 0.5 + w with a bias": Norm(eps=1e-5, kind="layer", weight_offset=0.5, bias=True),
}


def make(tokens, channels, dtype, seed=0, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, channels, generator=rng).mul(3).unbind()
    weight = 1 + 0.3 * torch.randn(channels, generator=rng)
    bias = torch.randn(channels, generator=rng)
    return [t.to(dtype) for t in (x + mean, residual, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_are_those_of_transformers(dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight, _ = make(9, 128, dtype)
    for theirs, options in ((LlamaRMSNorm, NORMS["rms"]), (Gemma2RMSNorm, NORMS["rms of 1 + w"])):
        module = theirs(128, eps=1e-5)
        module.weight.data = weight
        assert torch.equal(norm(x, weight, norm=options)[0], module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norms_are_those_of_torch(dtype, has_bias):
    x, _, weight, bias = make(9, 128, dtype)
    options = NORMS["layer with a bias" if has_bias else "layer"]
    bias = bias if has_bias else None
    want = torch.nn.functional.layer_norm(x, (128,), weight, bias, 1e-5)
    got, total = norm(x, weight, norm=options, bias=bias)
    assert total is x
    # Sums in another order: ulps of numbers up to 8, or the other neighbour of a rounding.
    ulps = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(got, want, rtol=ulps, atol=ulps)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_the_formula_in_float64(options, backend, device):
    x, residual, weight, bias = (t.to(device) for t in make(3, 200, torch.float32, mean=20.0))
    bias = bias if options.bias else None
    got, total = norm(x, weight, norm=options, bias=bias, residual=residual, backend=backend)
    rows = total.double()
    if options.kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    want = rows / (rows.square().mean(-1, keepdim=True) + options.eps).sqrt()
    want = want * (weight.double() + options.weight_offset) + (0.0 if bias is None else bias)
    # The mean, 20, is four deviations: what is left of it carries ulps of numbers up to 32.
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_the_variance_survives_a_mean_a_thousand_times_larger(backend, device):
    """Mean of squares minus square of the mean would have nothing left of it in float32."""
    x = 4096.0 + torch.tensor([[-1.0, 1.0]]).repeat(2, 64)
    ones = torch.ones(128, device=device)
    got, _ = norm(x.to(device), ones, norm=NORMS["layer"], backend=backend)
    want = (x - 4096.0) * (1 + 1e-5) ** -0.5
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (5, 576), (2, 1000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_matches_the_reference(tokens, channels, dtype, options, has_residual, device):
    x, residual, weight, bias = make(tokens, channels, dtype)
    wide = torch.full((tokens, channels + 8), torch.nan, dtype=dtype)  # rows of a larger tensor
    wide[:, :channels] = x
    given = {"bias": bias if options.bias else None, "residual": residual if has_residual else None}
    want, want_total = norm(x, weight, norm=options, **given, backend=Backend.REFERENCE)
    got, total = norm(
        wide.to(device)[:, :channels],
        weight.to(device),
        norm=options,
        **{name: None if t is None else t.to(device) for name, t in given.items()},
        backend=Backend.TRITON,
    )
    assert torch.equal(total.cpu(), want_total)
    # The sum of squares adds up in another order: some ulps of float32, which may move the rounding
    # of a float16 value and, through it, that of the product, by one step each. What a mean or a
    # bias cancels leaves ulps of numbers up to 8.
    rtol = 2.0 * torch.finfo(dtype).eps if dtype is torch.float16 else 1e-6
    atol = 2e-6 if options.kind == "layer" else 0.0
    torch.testing.assert_close(got.cpu(), want, rtol=rtol, atol=atol)


def test_errors_name_the_shapes():
    options, biased = NORMS["rms"], NORMS["layer with a bias"]
    x, weight = torch.zeros(2, 64), torch.ones(64)
    with pytest.raises(ShapeError, match=r"got \(2, 64\) and \(32,\)"):
        norm(x, weight[:32], norm=options)
    with pytest.raises(ShapeError, match=r"\(2, 64\) torch.float32 like x; got \(1, 64\)"):
        norm(x, weight, norm=options, residual=x[:1])
    with pytest.raises(ShapeError, match="the norm has a bias, the call none"):
        norm(x, weight, norm=biased)
    with pytest.raises(ShapeError, match="the norm has no bias, the call one"):
        norm(x, weight, norm=options, bias=weight)
    with pytest.raises(ShapeError, match=r"expected bias \(64,\), got \(32,\)"):
        norm(x, weight, norm=biased, bias=weight[:32])
