"""What vLLM's experts run is what a decoder block runs."""

from dataclasses import replace

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.families.registry import read_config
from quatom.integrations.vllm.expert_operator import name_expert_scheme
from quatom.integrations.vllm.opaque import as_argument
from quatom.modeling.block import summed
from tests.families.models import tiny_config
from tests.integrations.checkpoints import family_recipe


@pytest.mark.parametrize("recipe", ["quatom-w4a8kv4", "w4a16"])
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "olmoe",  # weights not normalized
        "phimoe",  # sparsemixer
        "glm4_moe",  # sigmoid scores, a correction, groups of experts, a factor, a shared expert
    ],
)
def test_the_operator_computes_what_a_block_does(family, recipe, monkeypatch):
    config = read_config(tiny_config(family).to_dict())
    blocks = random_model(config, family_recipe(recipe), device="cpu").model.blocks
    block = next(block for block in blocks if block.router is not None)
    # vLLM runs shared experts as linears of their own.
    monkeypatch.setattr(block, "_feed", lambda _: torch.zeros(()))
    if block.router.correction is not None:
        count = len(block.router.correction)
        block.router.correction.copy_(torch.linspace(0, 1, count).roll(3))
    sites = [block.linears[name].prepared for name in ("experts_gate_up", "experts_down")]
    inputs = [block.inputs[name] for name in ("experts_gate_up", "experts_down")]
    parts = [(given.spec, prepared) for given, prepared in zip(inputs, sites, strict=True)]
    scheme = name_expert_scheme(block.spec.experts, *parts)
    hidden = torch.randn(9, block.plan.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mixed, residual = block._mix(hidden, torch.zeros_like(hidden))
        want = summed(mixed)
        x, _ = block.norms["feed_forward"](residual)
        logits = torch.nn.functional.linear(x, block.router.weight)
        weights = [[as_argument(tensor) for tensor in prepared.tensors] for prepared in sites]
        arguments = (x, logits, block.router.correction, inputs[0].order, *weights, scheme)
        assert torch.equal(torch.ops.quatom.routed_experts(*arguments), want)
    assert name_expert_scheme(block.spec.experts, *parts) == scheme
    torch.library.opcheck(
        torch.ops.quatom.routed_experts.default,
        tuple(_plain(argument) for argument in arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_weights_that_a_library_packs_are_told_by_number(monkeypatch):
    """As on a CPU with AVX-512 VNNI; any CPU can make a tensor without storage."""
    config = read_config(tiny_config("mixtral").to_dict())
    block = random_model(config, family_recipe("w4a16"), device="cpu").model.blocks[0]
    packed = torch.randn(32, 32).to_mkldnn()
    parts, rows = [], block.plan.hidden_size
    for name in ("experts_gate_up", "experts_down"):
        prepared = block.linears[name].prepared
        parts.append((None, replace(prepared, tensors=(packed, *prepared.tensors[1:]))))

    def multiply(x, prepared, groups, *, top_k):
        assert prepared.tensors[0] is packed
        width = prepared.out_channels if top_k else rows
        return x.new_zeros(groups.slots.numel(), width)

    monkeypatch.setattr("quatom.integrations.vllm.expert_operator.expert_linear", multiply)
    weights = [[as_argument(tensor) for tensor in prepared.tensors] for _, prepared in parts]
    scheme = name_expert_scheme(block.spec.experts, *parts)
    x, logits = torch.randn(3, rows), torch.randn(3, block.spec.experts.count)
    y = torch.ops.quatom.routed_experts(x, logits, None, None, *weights, scheme)
    assert torch.equal(y, torch.zeros(3, rows))


def _plain(value):
    """A copy that no inference mode has marked."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
