"""The cuBLAS path of `linear`: exact with power-of-two scales, on a GPU and in the interpreter."""

import pytest
import torch

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout, expand_scales
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.linear import linear, prepare_weights
from quatom.ops.linear.cublas import (
    DEQUANTIZE_TOKENS,
    INT8_TOKENS,
    dequantize_weights,
    linear_cublas,
)
from quatom.ops.linear.triton_product import prepare_triton


def codes(rows, channels, low, high, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, channels), generator=rng).float()


def powers_of_two(rows, groups, seed):
    rng = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-6, -2, (rows, groups), generator=rng).float()


@pytest.mark.parametrize(
    "layout", [GroupLayout(256, 128), GroupLayout(160, 64), GroupLayout(512, 256)]
)
def test_packed_weights_dequantize_to_themselves(layout, device):
    values = codes(5, layout.channels, -8, 7, seed=1)
    scales = powers_of_two(5, layout.num_scales, seed=2).half()
    packed, _, stored = prepare_triton(values, scales, layout, 4)
    got = dequantize_weights(packed.to(device), stored.to(device), layout, torch.float16)
    assert torch.equal(got.cpu().float(), values * expand_scales(scales.float(), layout))


@pytest.mark.parametrize("tokens", [1, 40, INT8_TOKENS])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_is_exact_with_power_of_two_scales(tokens, has_bias, device):
    layout = GroupLayout(64, 64)
    w, x = codes(24, 64, -128, 127, seed=3), codes(tokens, 64, -128, 127, seed=4)
    ws, xs = powers_of_two(24, 1, seed=5).half(), powers_of_two(tokens, 1, seed=6)
    bias = torch.arange(24.0) if has_bias else None
    spec = QuantizeSpec(layout=layout, normal="int8")
    mixed = pack_values(x.to(device), xs.to(device), spec, torch.float16)
    tensors = tuple(t.to(device) for t in prepare_triton(w, ws, layout, 8))
    on_device = None if bias is None else bias.to(device)
    got = linear_cublas(mixed, tensors, layout, 24, on_device).cpu()
    # Products of a row stay below 2**20 and scales are powers of two: one rounding, to float16.
    want = (x.double() * xs) @ (w.double() * ws.double()).t()
    assert torch.equal(got, (want + (0 if bias is None else bias)).half())


@pytest.mark.parametrize("tokens", [3, DEQUANTIZE_TOKENS])
def test_both_ways_of_int4_weights_agree_with_float64(tokens, device):
    layout = GroupLayout(128, 64)
    w, x = codes(16, 128, -8, 7, seed=7), codes(tokens, 128, -8, 8, seed=8).half()
    ws = powers_of_two(16, 2, seed=9).half()
    tensors = tuple(t.to(device) for t in prepare_triton(w, ws, layout, 4))
    got = linear_cublas(x.to(device), tensors, layout, 16, None).cpu()
    want = x.double() @ (w.double() * expand_scales(ws.double(), layout)).t()
    assert torch.equal(got, want.half())


def test_what_it_cannot_run_is_named():
    def prepare(layout, weight, activation, device="cpu"):
        values = torch.zeros(8, layout.channels, device=device)
        scales = torch.ones(8, layout.num_scales, device=device)
        options = dict(weight_format=weight, activation_format=activation)
        return prepare_weights(values, scales, layout, backend=Backend.CUBLAS, **options)

    with pytest.raises(BackendError, match="needs a CUDA device, the weights are on cpu"):
        prepare(GroupLayout(64, 64), "int8", "int8")
    if torch.cuda.is_available():
        with pytest.raises(BackendError, match="32 outlier channels"):
            prepare(GroupLayout(64, 64, 32), "int8", "int8", "cuda")
        with pytest.raises(BackendError, match="one scale per row, this layout has 2"):
            prepare(GroupLayout(128, 64), "int8", "int8", "cuda")
    with pytest.raises(BackendError, match="activations, got float32"):
        linear_cublas(torch.zeros(1, 64), (torch.zeros(1),) * 3, GroupLayout(64, 64), 8, None)


@pytest.mark.gpu
@pytest.mark.parametrize(("weight", "activation"), [("int8", "int8"), ("int4", "float16")])
def test_it_is_what_a_gpu_chooses_for_its_schemes(weight, activation, device):
    layout = GroupLayout(128, 128)
    prepared = prepare_weights(
        torch.ones(16, 128, device=device),
        torch.ones(16, 1, device=device),
        layout,
        weight_format=weight,
        activation_format=activation,
    )
    assert prepared.backend is Backend.CUBLAS
    if activation == "float16":
        y = linear(torch.ones(2, 128, device=device, dtype=torch.float16), prepared)
        assert torch.equal(y.cpu(), torch.full((2, 16), 128.0).half())
