"""How near the codes and scales of a kernel must be to those of the reference."""

import torch

from quatom.ops.activations import MixedTensor, QuantizeSpec


def assert_near(got: MixedTensor, want: MixedTensor, spec: QuantizeSpec, *, most=1e-3):
    """For values that differ by ulps of float32: a scale by a float16 step, few codes by one.

    `most` is the share of codes that may differ: those next to a tie.
    """
    (codes, scales), (want_codes, want_scales) = got.canonical(), want.canonical()
    torch.testing.assert_close(scales.cpu(), want_scales, rtol=2**-10, atol=0)
    difference = (codes.cpu() - want_codes).abs()
    assert (difference != 0).float().mean() <= most
    step = 1.0
    if spec.normal == "e4m3":
        step = want_codes.abs().clamp(min=8) / 8
    elif spec.scale_mode == "multiples" and spec.byte_layout == "groups":
        step = 16.0  # a code of the largest multiple, or a multiple of the largest code
    assert (difference <= step).all()
