"""Rotations of both sides against matrices written out, and GPTQ against LDLQ as published."""

from functools import reduce
from math import cos, pi, sin

import numpy as np
import pytest
import torch

from quatom.numerics.formats import get_format
from quatom.numerics.groups import GroupLayout
from quatom.numerics.incoherence import rotation
from quatom.numerics.rounding import RoundingOptions, gptq, round_to_nearest

SIZES = {1: [1], 32: [32], 96: [3, 32], 256: [128, 2], 576: [9, 64], 1376: [43, 32], 7: [7]}
"""Sizes and their Kronecker factors."""


def small_matrix(size):
    """Hadamard by parities of shared bits, else Hartley."""
    if size & (size - 1) == 0:
        rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    else:
        angles = [[2 * pi * i * j / size for j in range(size)] for i in range(size)]
        rows = [[cos(a) + sin(a) for a in row] for row in angles]
    return np.array(rows) / size**0.5


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_a_kronecker_product_behind_signs(size):
    made = rotation(3, "model.layers.0 qkv", size)
    assert set(made.signs.tolist()) <= {1.0, -1.0}
    matrix = reduce(np.kron, map(small_matrix, SIZES[size])) * made.signs.numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    # Three factors of float32 sums of at most 128 terms: far below 1e-5 of a row's length.
    tolerance = 1e-5 * float(x.norm(dim=1).max())
    np.testing.assert_allclose(made.apply(x).numpy(), x.numpy() @ matrix.T, atol=tolerance)
    np.testing.assert_allclose(made.undo(made.apply(x)).numpy(), x.numpy(), atol=tolerance)
    # One value spreads over all channels: no entry above sqrt(2 / size).
    assert np.abs(matrix).max() <= (2 / size) ** 0.5 + 1e-12


def test_signs_come_from_seed_and_name_alone():
    """Written out: a checkpoint holds no signs, so they must never change."""
    signs = rotation(0, "model.layers.0 qkv", 16).signs
    want = "++++---------+-+"
    assert "".join("+" if sign > 0 else "-" for sign in signs) == want
    assert torch.equal(rotation(0, "model.layers.0 qkv", 64).signs[:16], signs)
    others = [rotation(1, "model.layers.0 qkv", 64), rotation(0, "model.layers.1 qkv", 64)]
    first = rotation(0, "model.layers.0 qkv", 64).signs
    assert all(not torch.equal(other.signs, first) for other in others)
    # As many of one as of the other, within three standard deviations of 4096 flips.
    assert abs(rotation(0, "x", 4096).signs.sum()) < 3 * 64


def ldlq(weight, hessian, step):
    """QuIP's algorithm 3 in float64: H = (U + I) D (U + I)^T, U strictly upper triangular.

    Column k is rounded from W_k + (W - What)[:, :k] U[:k, k]. `step` is the scale of each row.
    """
    flipped = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]  # upper: H = R R^T
    feedback = flipped / np.diag(flipped)  # unit diagonal
    rounded = np.zeros_like(weight)
    for k in range(weight.shape[1]):
        lost = (weight - rounded)[:, :k] @ feedback[:k, k]
        units = (weight[:, k] + lost) / step
        rounded[:, k] = np.clip(2 * np.round((units - 1) / 2) + 1, -15, 15) * step
    return rounded


@pytest.mark.parametrize("seed", range(4))
def test_gptq_in_stored_order_is_ldlq(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 48, generator=generator)
    x = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    moment, layout = x.t() @ x, GroupLayout(48, 48)
    options = RoundingOptions(normal=get_format("odd4"), outlier=get_format("int8"))
    got = gptq(weight, layout, options, moment)
    mean = moment.double().diagonal().mean()
    hessian = moment.double() + options.damping * mean * torch.eye(48, dtype=torch.float64)
    step = got.scales[:, 0].double()
    want = ldlq(weight.double().numpy(), hessian.numpy(), step.numpy())
    # The same codes: seeds whose numbers lie on no tie.
    assert np.array_equal(got.dequantize().numpy(), want.astype(np.float32))

    def loss(rounded):
        error = (weight - rounded.dequantize()).double()
        return float(((error @ moment.double()) * error).sum())

    assert loss(got) < loss(round_to_nearest(weight, layout, options))
