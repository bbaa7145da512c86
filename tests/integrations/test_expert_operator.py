"""What vLLM's experts run is what a decoder block runs."""

import pytest
import torch

from quatom.benchmark.random_weights import random_model
from quatom.families.registry import read_config
from quatom.integrations.vllm.expert_operator import name_expert_scheme
from tests.families.models import tiny_config
from tests.integrations.checkpoints import family_recipe


@pytest.mark.parametrize("recipe", ["quatom-w4a8kv4", "w4a16"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])  # weights normalized and not
def test_the_operator_computes_what_a_block_does(family, recipe):
    config = read_config(tiny_config(family).to_dict())
    block = random_model(config, family_recipe(recipe), device="cpu").model.blocks[0]
    sites = [block.linears[name].prepared for name in ("experts_gate_up", "experts_down")]
    inputs = [block.inputs[name] for name in ("experts_gate_up", "experts_down")]
    parts = [(given.spec, prepared) for given, prepared in zip(inputs, sites, strict=True)]
    scheme = name_expert_scheme(block.spec.experts, *parts)
    hidden = torch.randn(9, block.plan.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, residual = block._mix(hidden, torch.zeros_like(hidden))
        x, _ = block.norms["feed_forward"](residual)
        logits = torch.nn.functional.linear(x, block.router.weight)
        weights = [list(prepared.tensors) for prepared in sites]
        arguments = (x, logits, inputs[0].order, *weights, scheme)
        assert torch.equal(torch.ops.quatom.routed_experts(*arguments), want)
    assert name_expert_scheme(block.spec.experts, *parts) == scheme
    torch.library.opcheck(
        torch.ops.quatom.routed_experts.default,
        tuple(_plain(argument) for argument in arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def _plain(value):
    """A copy that no inference mode has marked."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
