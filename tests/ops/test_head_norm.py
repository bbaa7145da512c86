"""head_norm: the reference against transformers and float64, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch
from tests.covering import covering

from quatom.errors import ShapeError
from quatom.families.spec import Norm
from quatom.ops.backend import Backend
from quatom.ops.head_norm import HeadNorms, head_norm

NORMS = {
    "rms": Norm(eps=1e-5),
    "rms of 1 + w": Norm(eps=1e-5, weight_offset=1.0),
    "layer": Norm(eps=1e-5, kind="layer"),
}


def make(tokens, heads, kv_heads, head_dim, dtype=torch.float32, axis="head", device="cpu"):
    """q and k as views of a fused output whose other channels are NaN, and their weights."""
    rng = torch.Generator().manual_seed(tokens + head_dim)
    fused = torch.full((tokens, heads + 2 * kv_heads, head_dim), torch.nan)
    fused[:, : heads + kv_heads] = 3 * torch.randn(
        tokens, heads + kv_heads, head_dim, generator=rng
    )
    q, k, _ = fused.to(device, dtype).split((heads, kv_heads, kv_heads), dim=1)
    shapes = [
        {"head": (head_dim,), "each": (n, head_dim), "all": (n * head_dim,)}[axis]
        for n in (heads, kv_heads)
    ]
    weights = [(1 + 0.3 * torch.randn(n, generator=rng)).to(device, dtype) for n in shapes]
    return q, k, *weights


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("axis", ["head", "each", "all"])
def test_the_reference_is_the_formula_in_float64(axis, norm):
    q, k, *weights = make(3, 4, 2, 96, axis=axis)
    got = head_norm(q, k, HeadNorms(*weights, norm, axis))
    for x, weight, out in zip((q, k), weights, got, strict=True):
        rows = (x.flatten(1) if axis == "all" else x).double()
        if norm.kind == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        want = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        want = want * (weight.double() + norm.weight_offset)
        # A few roundings of float32 numbers up to 6 or so.
        torch.testing.assert_close(out.double(), want.view(x.shape), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_as_transformers_does(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    q, k, q_weight, k_weight = make(5, 4, 2, 64, dtype)
    for theirs, norm in ((Qwen3RMSNorm, NORMS["rms"]), (Gemma3RMSNorm, NORMS["rms of 1 + w"])):
        module = theirs(64, eps=1e-5)
        got = head_norm(q, k, HeadNorms(q_weight, k_weight, norm, "head"))
        for x, weight, out in zip((q, k), (q_weight, k_weight), got, strict=True):
            module.weight.data = weight
            assert torch.equal(out, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_each_head_is_that_of_transformers(dtype):
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

    q, k, *weights = make(5, 4, 2, 64, dtype, "each")
    got = head_norm(q, k, HeadNorms(*weights, NORMS["layer"], "each"))
    for x, weight, out in zip((q, k), weights, got, strict=True):
        cohere = CohereLayerNorm(weight.shape, eps=1e-5)
        cohere.weight.data = weight
        stablelm = StableLmLayerNormPerHead(64, len(weight), eps=1e-5)
        for own, norm in zip(weight, stablelm.norms, strict=True):
            norm.weight.data = own
        # Roundings of float32 before the one to the dtype may move that by a step.
        step = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, cohere(x), rtol=step, atol=1e-6)
        theirs = stablelm(x.transpose(0, 1)[None])[0].transpose(0, 1)
        torch.testing.assert_close(out, theirs, rtol=step, atol=1e-6)


SHAPES = [(1, 1, 64), (9, 3, 100), (16, 2, 128), (4, 1, 256)]
"""(heads, KV heads, channels of a head)"""


# The axis and the shape decide what a program reads, the norm what it makes of a row.
@pytest.mark.parametrize(
    ("axis", "shape", "norm", "dtype"),
    covering(("head", "each", "all"), SHAPES, list(NORMS), (torch.float16, torch.float32)),
)
def test_the_kernel_matches_the_reference(axis, shape, norm, dtype, device):
    norm, (q, k, *weights) = NORMS[norm], make(5, *shape, dtype, axis, device)
    norms = HeadNorms(*weights, norm, axis)
    got = head_norm(q, k, norms, backend=Backend.TRITON)
    want = head_norm(q, k, norms, backend=Backend.REFERENCE)
    # Sums add up in another order: some ulps of float32, which may move the rounding of a float16
    # value and, through it, that of the product, by one step each. A difference from the mean may
    # cancel, so its ulps are those of numbers around 8.
    rtol = 2.0 * torch.finfo(dtype).eps if dtype is torch.float16 else 2e-6
    atol = 2e-6 if norm.kind == "layer" else 0.0
    for out, expected in zip(got, want, strict=True):
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_no_tokens_are_no_work(backend, device):
    q, k, *weights = make(0, 4, 2, 64, device=device)
    q, k = head_norm(q, k, HeadNorms(*weights, NORMS["rms"], "head"), backend=backend)
    assert q.shape == (0, 4, 64)
    assert k.shape == (0, 2, 64)


def test_errors_name_the_shapes():
    q, k, q_weight, k_weight = make(2, 4, 2, 64)
    norms = HeadNorms(q_weight, k_weight, NORMS["rms"], "head")
    with pytest.raises(ShapeError, match=r"k \(T, KV, D\) of one dtype, got .*\(2, 2, 32\)"):
        head_norm(q, k[..., :32], norms)
    with pytest.raises(ShapeError, match=r"weight \(256,\) for q \(2, 4, 64\), got \(64,\)"):
        head_norm(q, k, replace(norms, axis="all"))
    with pytest.raises(ShapeError, match=r"weight \(4, 64\) for q \(2, 4, 64\), got \(64,\)"):
        head_norm(q, k, replace(norms, axis="each"))
    turned = q_weight.expand(4, 64).t().contiguous().t()
    with pytest.raises(ShapeError, match=r"a contiguous weight \(4, 64\) .* strides \(1, 4\)"):
        head_norm(q, k, replace(norms, q_weight=turned, axis="each"))
    biased = Norm(eps=1e-5, kind="layer", bias=True)
    with pytest.raises(ShapeError, match="has a bias"):
        head_norm(q, k, replace(norms, norm=biased))
