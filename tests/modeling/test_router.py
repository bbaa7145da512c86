"""Routers by hand; tests/families compares whole models with transformers."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from quatom.errors import ModelError
from quatom.families.corrected import CORRECTED
from quatom.families.spec import Experts, FeedForward, Router
from quatom.modeling.router import ExpertRouter, route, runs_fused
from quatom.ops.backend import Backend
from quatom.ops.experts.router_weight import RouterWeight
from quatom.ops.experts.triton_routing import route_rows_triton
from tests.covering import covering

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0]])


def experts(top_k=2, count=4, **router):
    return Experts(
        count=count,
        top_k=top_k,
        feed_forward=FeedForward(size=32),
        router=Router(**router),
        tensors={"weight": ("gate.weight",)},
    )


def chosen(routing):
    pairs = zip(routing.expert_ids[0].tolist(), routing.weights[0].tolist(), strict=True)
    return {expert: pytest.approx(weight, rel=1e-6) for expert, weight in pairs}


def test_softmax_over_all_or_over_the_chosen():
    shares = LOGITS[0].exp() / LOGITS[0].exp().sum()
    assert chosen(route(LOGITS, experts())) == {1: shares[1].item(), 2: shares[2].item()}
    total = (shares[1] + shares[2]).item()
    want = {1: shares[1].item() / total, 2: shares[2].item() / total}
    assert chosen(route(LOGITS, experts(normalized=True))) == want


def test_a_correction_counts_for_the_choice_alone():
    correction = torch.tensor([0.5, 0.0, 0.0, 0.0])
    sigmoids = LOGITS[0].sigmoid()
    # 0: 0.5 + 0.5, 1: 0.88, 2: 0.73, 3: 0.27
    got = chosen(route(LOGITS, experts(scores="sigmoid", scale=3.0), correction))
    assert got == {0: 3 * sigmoids[0].item(), 1: 3 * sigmoids[1].item()}


def test_a_softmax_is_corrected_over_all_experts():
    spec = replace(experts(normalized=True, least_sum=1e-12), tensors=CORRECTED)
    shares = LOGITS[0].softmax(0)  # 0.087, 0.644, 0.237, 0.032
    got = chosen(route(LOGITS, spec, torch.tensor([0.5, 0.0, 0.0, 0.3])))
    total = (shares[0] + shares[1]).item()
    assert got == {0: shares[0].item() / total, 1: shares[1].item() / total}
    # A correction may choose experts that the token hardly asks for.
    far = torch.tensor([[100.0, 100.0, 0.0, 0.0]])
    weights = route(far, spec, torch.tensor([0.0, 0.0, 2.0, 2.0])).weights
    # exp(-100) / 2 of 1e-12; divided by their own sum, both would be 0.5.
    assert weights.max() < 1e-30


def test_no_kernel_chooses_by_a_corrected_softmax():
    spec = replace(experts(), tensors=CORRECTED)
    assert not runs_fused(spec, torch.device("cpu"), Backend.TRITON)
    assert runs_fused(experts(), torch.device("cpu"), Backend.TRITON)


def test_groups_are_chosen_by_their_two_best():
    # Sums of two: 0.88 + 0.5 and 0.73 + 0.73; the largest score lies in the group that loses.
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0]])
    spec = experts(scores="sigmoid", groups=2, top_groups=1)
    assert set(chosen(route(logits, spec))) == {2, 3}


def test_sparsemixer_chooses_one_after_the_other():
    # Within 2 * 0.3 of the largest, in units of max(|x|, largest): 2 and 1 ((2 - 1) / 2 = 0.5).
    got = chosen(route(LOGITS, experts(scores="sparsemixer", jitter=0.3)))
    first = torch.tensor([2.0, 1.0]).softmax(0)[0].item()
    # Then 1 alone: (1 - 0) / 1 and (1 + 1) / 1 are too far.
    assert got == {1: first, 2: 1.0}
    zeros = chosen(route(torch.zeros(1, 4), experts(scores="sparsemixer", jitter=0.01)))
    assert sorted(zeros.values(), key=lambda w: w.expected) == [0.25, pytest.approx(1 / 3)]


def test_a_router_is_float32_whatever_its_input():
    spec = experts(top_k=1)
    # In bfloat16 both products would be 1: 2**-9 is lost.
    weight = torch.tensor([[1.0, 0.0], [1.0, 2.0**-9], [0.0, 0.0], [0.0, 0.0]])
    routing = ExpertRouter(spec, {"weight": weight})(torch.ones(1, 2, dtype=torch.bfloat16))
    assert routing.expert_ids.tolist() == [[1]]
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize(
    ("count", "top_k", "router", "corrected"),
    [
        (8, 2, dict(normalized=True), False),
        (60, 4, dict(), False),
        (128, 8, dict(normalized=True, scale=2.5), False),
        (32, 1, dict(scores="sigmoid"), False),
        (160, 8, dict(scores="sigmoid", normalized=True, scale=2.5), True),
        (3, 3, dict(scores="sigmoid"), True),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_the_kernel_chooses_as_the_reference_does(count, top_k, router, corrected, tokens, device):
    rng = torch.Generator().manual_seed(count + tokens)
    logits = torch.randn(tokens, count, generator=rng).mul_(4).to(device)
    correction = torch.randn(count, generator=rng).to(device) if corrected else None
    spec = experts(top_k, count, **router)
    got, want = (
        route(logits, spec, correction, backend=b) for b in (Backend.TRITON, Backend.REFERENCE)
    )
    assert torch.equal(got.expert_ids, want.expert_ids)
    # An exponential on a GPU is within 2 ulp; k of them are added up and divided by.
    torch.testing.assert_close(got.weights, want.weights, rtol=(4 + top_k) * 2.0**-23, atol=1e-30)


def test_products_that_are_no_numbers_name_experts_that_there_are(device):
    logits = torch.full((5, 6), float("nan"), device=device)
    logits[3:] = -float("inf")
    ids = route(logits, experts(4, 6), backend=Backend.TRITON).expert_ids
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "5 experts per token of 4"),
        ({"scores": "sparsemixer", "top_k": 1}, "chooses 2 experts"),
        ({"groups": 3, "top_groups": 1}, "4 experts cannot be cut into 3"),
        ({"groups": 2, "top_groups": 3}, "2 equal groups of which 3"),
        ({"groups": 4, "top_groups": 2}, "groups must hold 2 experts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        experts(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_is_a_sum_of_numbers_of_16_bits(dtype):
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 1000, generator=rng).mul_(0.02)
    halves = RouterWeight.of(weight, dtype)
    shares = halves.step ** torch.arange(len(halves.parts), dtype=torch.float64)
    total = (halves.parts.double() * shares[:, None, None]).sum(0)
    assert len(halves.parts) == 3
    # bfloat16 has every bit of a float32; float16 none below 2**-24, of the third part 2**-46.
    assert (total - weight.double()).abs().max() <= (0 if dtype is torch.bfloat16 else 2.0**-46)
    exact = RouterWeight.of(weight.to(dtype).float(), dtype)
    assert torch.equal(exact.parts, weight.to(dtype)[None])
    assert RouterWeight.of(torch.full((2, 2), 1e5), torch.float16) is None


ROUTERS = [
    (5, 2, dict(normalized=True), True),
    (128, 8, dict(normalized=True), False),
    (130, 4, dict(scores="sigmoid", normalized=True, scale=2.5), True),
]
"""(experts, chosen ones, options, whether there is a bias or a correction)"""


# Into how many parts the weight is cut changes nothing in how experts are chosen.
@pytest.mark.parametrize(
    ("tokens", "router", "parts", "dtype"),
    [
        *((*point, torch.float16) for point in covering((0, 1, 37), ROUTERS, (1, 2, 3))),
        (2100, ROUTERS[0], 2, torch.float16),
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        *(
            pytest.param(*point, 3, torch.bfloat16, marks=pytest.mark.gpu)
            for point in [*product((0, 1, 37), ROUTERS), (2100, ROUTERS[0])]
        ),
    ],
)
def test_the_kernel_of_rows_multiplies_as_float32_does(tokens, router, parts, dtype, device):
    count, top_k, router, corrected = router
    rng = torch.Generator().manual_seed(count + tokens)
    channels = 1000 if count == 128 else 200  # of 1000, four programs have a share each
    bits = 11 if dtype is torch.float16 else 8

    def integers(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=rng).float()

    # Sums of the first part's products are below 2**8 steps of it: with 16 bits of the parts after
    # it every sum is a number of 24 bits, in any order. Three parts of float16 are 22 bits more
    # than the first: there a token has one channel, whose product has 24.
    shares = [2.0 ** (-bits * part) for part in range(parts)]
    weight = sum(integers(3, count, channels) * share for share in shares) / 8
    x, one_channel = integers(1, tokens, channels), bits * (parts - 1) > 16
    if one_channel:
        weight += weight.sign() / 8 * (weight.abs() < 0.1)
        x = torch.eye(channels)[torch.arange(tokens) % channels]
    held = RouterWeight.of(weight, dtype)
    assert len(held.parts) == parts
    held = RouterWeight(held.parts.to(device), held.step)
    bias = integers(4, count).to(device) if corrected and not one_channel else None
    correction = torch.randn(count, generator=rng).to(device) if router.get("scores") else None
    spec = experts(top_k, count, **router)
    ids, weights = route_rows_triton(
        x.to(device, dtype), held, top_k, spec.router, bias, correction
    )
    exact = x.double() @ weight.double().t()
    exact = exact if bias is None else exact + bias.double().cpu()
    logits = exact.float()
    assert torch.equal(logits.double(), exact)
    # The same order of equals; sums of k scores, or of E, in another order.
    want = route(logits.to(device), spec, correction, backend=Backend.TRITON)
    assert torch.equal(ids, want.expert_ids)
    torch.testing.assert_close(weights, want.weights, rtol=2.0**-20, atol=0)
