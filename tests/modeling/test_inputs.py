"""What precedes a linear: with and without quantization it makes the same input."""

import pytest
import torch

from quatom.families.registry import read_config
from quatom.families.spec import FeedForward, Norm
from quatom.modeling.inputs import InputQuantizer, NormLayer
from quatom.modeling.weights import NormWeights
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import MixedTensor, QuantizeSpec
from quatom.ops.norm import norm
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.conftest import LLAMA

LAYOUT = GroupLayout(normal=96, group_size=64, outliers=32)
# e4m3 with whole float range and int8 outliers lose little: 2**-4 of a value at most.
SPEC = QuantizeSpec(layout=LAYOUT, normal="e4m3", outlier="int8")


def tokens(seed=0, rows=5, channels=128):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def order():
    return torch.randperm(128, generator=torch.Generator().manual_seed(9))


def test_plain_inputs_are_reordered_and_no_more():
    x = tokens()
    assert torch.equal(InputQuantizer(None, order()).plain(x), x[:, order()])
    assert torch.equal(InputQuantizer(None).plain(x), x)


NORM = Norm(eps=1e-5)
SWIGLU = FeedForward(size=128)


def test_norm_adds_the_residual_and_returns_the_sum():
    x, residual, weight = tokens(), tokens(1), 1 + 0.1 * tokens(2)[0]
    layer = NormLayer(NORM, NormWeights(weight))
    made, total = InputQuantizer(None, order()).norm(x, residual, layer)
    assert torch.equal(total, x + residual)
    assert torch.equal(made, norm(x + residual, weight, norm=Norm(eps=1e-5))[0][:, order()])
    made, total = InputQuantizer(None).norm(x, None, layer)
    assert torch.equal(total, x)
    assert torch.equal(made, norm(x, weight, norm=Norm(eps=1e-5))[0])


@pytest.mark.parametrize("method", ["norm", "plain", "activate"])
def test_quantized_inputs_are_the_plain_ones_up_to_their_steps(method):
    """Each of the three ways, judged by the real numbers that its codes stand for."""
    arguments = {
        "norm": (tokens(), tokens(1), NormLayer(NORM, NormWeights(1 + 0.1 * tokens(2)[0]))),
        "plain": (tokens(),),
        "activate": (tokens(channels=256), SWIGLU),
    }[method]
    # silu(gate) * up arrives in order: gate's and up's rows are permuted.
    orders = None if method == "activate" else order()
    plain = getattr(InputQuantizer(None, orders), method)(*arguments)
    codes = getattr(InputQuantizer(SPEC, orders), method)(*arguments)
    if method == "norm":
        assert torch.equal(plain[1], codes[1])
        plain, codes = plain[0], codes[0]
    assert isinstance(codes, MixedTensor)
    error = (codes.dequantize() - plain).abs()
    # e4m3 keeps 3 mantissa bits: half a step is 2**-4 of the value, but at least half a subnormal
    # step of its group; int8 half of absmax / 127, and the float16 scale another 2**-11.
    largest = plain[:, :96].abs().amax(dim=1, keepdim=True)
    assert (error[:, :96] <= plain[:, :96].abs() * 2.0**-4 * 1.01 + largest * 2.0**-17).all()
    largest = plain[:, 96:].abs().amax(dim=1, keepdim=True)
    assert (error[:, 96:] <= largest / 127 * 0.5 + largest * 2.0**-11).all()


def test_inputs_without_a_norm_are_the_sum():
    x, residual = tokens(), tokens(1)
    made, total = InputQuantizer(None, order()).norm(x, residual, None)
    assert torch.equal(total, x + residual)
    assert torch.equal(made, total[:, order()])
    codes, total = InputQuantizer(SPEC, order()).norm(x, residual, None)
    assert isinstance(codes, MixedTensor)
    assert torch.equal(codes.codes, InputQuantizer(SPEC, order()).plain(x + residual).codes)


def test_the_plan_says_how_inputs_are_quantized():
    def spec(preset):
        return plan(read_config(LLAMA), PRESETS[preset]).layers[0].sites["qkv"].input_spec

    assert spec("w4a16") is None
    atom = spec("atom-w4a4kv4")
    assert (atom.normal, atom.outlier, atom.clip_ratio, atom.rotate) == ("int4", "int8", 0.9, False)
    assert (atom.layout.normal, atom.layout.outliers) == (224, 32)
    assert spec("quatom-w4a4kv4").rotate


def test_the_order_follows_the_module_to_its_device():
    quantizer = InputQuantizer(None, order())
    assert quantizer.order.dtype == torch.int32
    assert dict(quantizer.named_buffers()).keys() == {"order"}
    assert quantizer.state_dict() == {}
