"""group_tokens and combine: a stable sort by expert, and sums that do not depend on it."""

import pytest
import torch

from quatom.ops.backend import Backend
from quatom.ops.experts import combine, group_tokens

BACKENDS = [Backend.REFERENCE, Backend.TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "k", "experts"),
    [(0, 2, 4), (1, 1, 1), (1, 2, 8), (7, 3, 5), (700, 4, 6), (64, 8, 128), (1100, 8, 6)],
)
def test_slots_are_sorted_stably(backend, tokens, k, experts, device):
    rng = torch.Generator().manual_seed(tokens)
    ids = torch.randint(experts, (tokens, k), generator=rng, dtype=torch.int32)
    if tokens > 8:
        ids[ids == 2] = 3  # an expert without a token
    groups = group_tokens(ids.to(device), experts, backend=backend)
    by_expert = [[] for _ in range(experts)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        by_expert[expert].append(slot)
    slots = [slot for own in by_expert for slot in own]
    places = {slot: place for place, slot in enumerate(slots)}
    assert groups.slots.tolist() == slots
    bounds = [0]
    for own in by_expert:
        bounds.append(bounds[-1] + len(own))
    assert groups.offsets.tolist() == bounds
    assert groups.positions.tolist() == [places[slot] for slot in range(tokens * k)]
    assert {t.dtype for t in (groups.slots, groups.offsets, groups.positions)} == {torch.int32}
    assert groups.num_experts == experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_token_is_the_weighted_sum_of_its_slots(backend, dtype, device):
    rng = torch.Generator().manual_seed(1)
    tokens, k, hidden = 13, 3, 1100
    ids = torch.randint(5, (tokens, k), generator=rng, dtype=torch.int32)
    by_slot = torch.randn(tokens * k, hidden, generator=rng).to(dtype)
    weights = torch.rand(tokens, k, generator=rng)
    groups = group_tokens(ids.to(device), 5)
    y = by_slot.to(device)[groups.slots.long()]
    got = combine(y, groups, weights.to(device), backend=backend).cpu()
    want = torch.zeros(tokens, hidden)
    for j in range(k):  # each product and sum rounded by itself
        want += by_slot.view(tokens, k, hidden)[:, j].float() * weights[:, j : j + 1]
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_does_not_depend_on_the_other_tokens(backend, device):
    rng = torch.Generator().manual_seed(2)
    by_slot = torch.randn(24, 64, generator=rng).half().to(device)
    weights = torch.rand(6, 4, generator=rng).to(device)
    results = []
    for ids in (
        torch.zeros(6, 4),
        torch.arange(24).view(6, 4) % 7,
        torch.arange(24).view(6, 4) // 5,
    ):
        groups = group_tokens(ids.int().to(device), 7)
        results.append(combine(by_slot[groups.slots.long()], groups, weights, backend=backend))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
