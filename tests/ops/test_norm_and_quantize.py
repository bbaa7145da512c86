"""A norm whose result is kept beside its codes: the codes are those of what is kept."""

import pytest
import torch
from tests.ops.test_cuda_quantize import LAYOUTS, make_inputs, variants

from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec
from quatom.ops.cuda_quantize import quantize_cuda
from quatom.ops.norm import norm as normalize
from quatom.ops.norm_quantize import norm_and_quantize
from quatom.ops.reorder_quantize import reorder_quantize

NORMS = {
    "rms": Norm(eps=1e-5),
    "rms of 1 + w": Norm(eps=1e-5, weight_offset=1.0),
    "layer with a bias": Norm(eps=1e-5, kind="layer", bias=True),
}


def test_it_is_the_norm_and_then_the_codes():
    layout = GroupLayout(96, 32, 32)
    x, residual, weight, order = make_inputs(5, layout.channels, torch.bfloat16)
    spec = QuantizeSpec(layout=layout)
    got, normed, total = norm_and_quantize(
        x, weight, order, spec, norm=NORMS["rms"], residual=residual
    )
    want, want_total = normalize(x, weight, norm=NORMS["rms"], residual=residual)
    assert torch.equal(normed, want)
    assert torch.equal(total, want_total)
    codes = reorder_quantize(want, order, spec)
    assert torch.equal(got.codes, codes.codes)
    assert torch.equal(got.scales, codes.scales)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("scale_mode", ["group", "row", "multiples"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_variant_keeps_what_it_quantizes(layout, scale_mode, norm):
    for tokens, dtype in ((1, torch.bfloat16), (9, torch.float16)):
        x, residual, weight, order = make_inputs(tokens, layout.channels, dtype)
        bias = residual[0].contiguous() if norm.bias else None
        spec = QuantizeSpec(layout=layout, scale_mode=scale_mode, byte_layout="groups")
        for add, used in ((residual, order), (None, None)):
            want, want_total = normalize(x, weight, norm=norm, bias=bias, residual=add)
            for variant in variants(layout):
                kept = torch.full_like(x, float("nan"), device="cuda")
                got, total = quantize_cuda(
                    "norm",
                    x.cuda(),
                    spec,
                    order=None if used is None else used.cuda(),
                    weight=weight.cuda(),
                    bias=None if bias is None else bias.cuda(),
                    residual=None if add is None else add.cuda(),
                    norm=norm,
                    kept=kept,
                    variant=variant,
                )
                assert torch.equal(total.cpu(), want_total), variant
                # Inverse norms differ by an ulp of float32, which two roundings to 16 bits and,
                # of a layer norm, the sum with the bias may turn into a step of the largest part.
                step = 2.0 ** (-7 if dtype is torch.bfloat16 else -10)
                torch.testing.assert_close(kept.cpu(), want, rtol=2 * step, atol=4 * step)
                assert (kept.cpu() != want).float().mean() <= 2e-2, variant
                codes = reorder_quantize(kept.cpu(), used, spec, backend="reference").canonical()
                for mine, theirs in zip(got.canonical(), codes, strict=True):
                    assert torch.equal(mine.cpu(), theirs), variant
