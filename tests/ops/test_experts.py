"""expert_linear: every backend against exact arithmetic, however tokens are routed."""

import dataclasses

import pytest
import torch
from tests.ops.test_linear import CPU, CUDA, exact, multiples, powers_of_two, random_codes

from quatom.errors import BackendError, ShapeError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.experts import (
    Routing,
    combine,
    expert_linear,
    group_tokens,
    prepare_experts,
)
from quatom.ops.linear import linear, prepare_weights

BACKENDS = [Backend.REFERENCE, CPU, Backend.TRITON, CUDA]
ROUTINGS = ("spread", "one expert", "none to the first", "one each")


def route(tokens, k, experts, kind, rng):
    """Expert ids (T, k) int32, the k of a token distinct where there are enough experts."""
    if kind == "one expert":
        return torch.full((tokens, k), experts - 1, dtype=torch.int32)
    if kind == "one each":  # as even as it gets
        return (torch.arange(tokens * k) % experts).view(tokens, k).int()
    low = 1 if kind == "none to the first" else 0
    ids = torch.rand((tokens, experts - low), generator=rng).argsort(dim=1)[:, :k] + low
    return ids.int()


@dataclasses.dataclass
class Problem:
    """Codes of one grouped product, on the CPU."""

    x: torch.Tensor
    xs: torch.Tensor
    w: torch.Tensor
    ws: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor
    layout: GroupLayout
    fmt: str
    scale_mode: str

    @classmethod
    def make(
        cls,
        layout,
        tokens,
        k,
        experts,
        rows,
        kind,
        *,
        fmt="int4",
        scale_mode="group",
        weight="int4",
    ):
        rng = torch.Generator().manual_seed(tokens + experts)
        x = random_codes(tokens, layout, fmt, rng)
        w = torch.stack([random_codes(rows, layout, weight, rng) for _ in range(experts)])
        xs = powers_of_two(tokens, layout, rng, -6, -3)
        make_ws = powers_of_two
        if scale_mode == "row":
            xs[:, : layout.num_normal_groups] = xs[:, :1]
            make_ws = multiples
        elif scale_mode == "multiples":
            xs, make_ws = multiples(tokens, layout, rng, -6, -3), multiples
        ws = torch.stack([make_ws(rows, layout, rng, -8, -6) for _ in range(experts)])
        bias = torch.randint(-8, 8, (experts, rows), generator=rng).float()
        ids = route(tokens, k, experts, kind, rng)
        return cls(x, xs, w, ws, bias, ids, layout, fmt, scale_mode)

    def prepare(self, backend, device, weight="int4"):
        """The experts of this problem."""
        return prepare_experts(
            self.w.to(device),
            self.ws.half().to(device),
            self.layout,
            bias=self.bias.to(device),
            weight_format=weight,
            activation_format=self.fmt,
            scale_mode=self.scale_mode,
            backend=backend,
        )

    def mixed(self, experts, device, rows=None):
        """The input, or these rows of it, as the experts read it."""
        spec = QuantizeSpec(layout=self.layout, normal=self.fmt, scale_mode=self.scale_mode)
        x, xs = (self.x, self.xs) if rows is None else (self.x[rows], self.xs[rows])
        spec = experts.input_spec(spec)
        return pack_values(x.to(device), xs.to(device), spec, torch.float16)

    def run(self, backend, device, *, gathered=True, weight="int4"):
        """expert_linear of rows by token, or (not `gathered`) of rows in grouped order."""
        device = "cpu" if backend is Backend.CPU else device
        k = self.ids.shape[1]
        groups = group_tokens(self.ids.to(device), self.w.shape[0])
        experts = self.prepare(backend, device, weight)
        mixed = self.mixed(experts, device, None if gathered else groups.slots.cpu().long() // k)
        # The allocator hands the same block out again: what is not written stays NaN.
        shape = (self.ids.numel(), self.w.shape[1])
        poison = torch.full(shape, torch.nan, dtype=mixed.dtype, device=device)
        del poison
        return expert_linear(mixed, experts, groups, top_k=k if gathered else None).cpu()

    def want(self):
        """The same in float64, (T k, N)."""
        order = self.ids.flatten().sort(stable=True)
        parts = [torch.empty(0, self.w.shape[1], dtype=torch.float64)]
        for expert in order.values.unique().tolist():
            rows = order.indices[order.values == expert] // self.ids.shape[1]
            w, ws, bias = self.w[expert], self.ws[expert], self.bias[expert]
            parts.append(exact(self.x[rows], self.xs[rows], w, ws, self.layout, bias))
        return torch.cat(parts)


SCHEMES = [("int4", "group"), ("int8", "row"), ("int4", "multiples")]
LAYOUTS = {
    "outliers": GroupLayout(256, 128, 64),
    "short last group, two outlier blocks": GroupLayout(160, 64, 64, 2),
    "no outliers": GroupLayout(192, 96),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("fmt", "scale_mode"), SCHEMES)
def test_products_are_exact_however_tokens_are_routed(backend, kind, fmt, scale_mode, device):
    layout = LAYOUTS["outliers"]
    problem = Problem.make(layout, 11, 2, 5, 72, kind, fmt=fmt, scale_mode=scale_mode)
    # Exact for the reasons given in test_linear: float32 holds every partial sum.
    assert torch.equal(problem.run(backend, device), problem.want().half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("fmt", "scale_mode"), SCHEMES)
def test_rows_that_are_grouped_already_are_not_gathered(backend, layout, fmt, scale_mode, device):
    problem = Problem.make(layout, 11, 3, 4, 68, "spread", fmt=fmt, scale_mode=scale_mode)
    got = problem.run(backend, device, gathered=False)
    assert torch.equal(got, problem.want().half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "k", "experts"), [(1, 1, 1), (1, 2, 8), (3, 1, 4), (40, 4, 4), (65, 2, 3), (0, 2, 4)]
)
def test_one_token_one_expert_and_none(backend, tokens, k, experts, device):
    problem = Problem.make(LAYOUTS["outliers"], tokens, k, experts, 64, "spread")
    for gathered in (True, False):
        got = problem.run(backend, device, gathered=gathered)
        assert torch.equal(got, problem.want().half())


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize(
    ("weight", "fmt", "layout"),
    [
        ("int4", "e4m3", GroupLayout(192, 64, 64)),
        ("int3", "int3", GroupLayout(192, 64, 64)),
        ("int8", "int8", GroupLayout(320, 320)),
        ("int4", "int8", GroupLayout(512, 256)),
    ],
)
def test_every_format_has_the_accuracy_of_float32(backend, weight, fmt, layout, device):
    problem = Problem.make(layout, 9, 2, 4, 68, "spread", fmt=fmt, weight=weight)
    rng = torch.Generator().manual_seed(3)
    problem.xs = torch.rand(problem.xs.shape, generator=rng).half().float() + 0.0625
    got, want = problem.run(backend, device, weight=weight), problem.want()
    # Float16 output rounds by 2**-12 on average.
    assert (got.double() - want).norm() / want.norm() <= 4e-4


@pytest.mark.parametrize("backend", [Backend.REFERENCE, CPU, Backend.TRITON, CUDA])
def test_an_expert_is_a_linear_layer(backend, device):
    device = "cpu" if backend is Backend.CPU else device
    problem = Problem.make(GroupLayout(256, 128, 64), 7, 1, 2, 64, "one expert")
    alone = prepare_weights(
        problem.w[1].to(device), problem.ws[1].half().to(device), problem.layout, backend=backend
    )
    spec = alone.input_spec(QuantizeSpec(layout=problem.layout))
    mixed = pack_values(problem.x.to(device), problem.xs.to(device), spec, torch.float16)
    problem.bias.zero_()
    assert torch.equal(problem.run(backend, device), linear(mixed, alone).cpu())


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_w4a16_takes_plain_tensors(backend, device):
    layout = GroupLayout(160, 64)
    rng = torch.Generator().manual_seed(3)
    w = torch.stack([random_codes(40, layout, "int4", rng) for _ in range(3)])
    ws = (torch.rand(3, 40, 3, generator=rng) * 0.1).half()
    x = torch.randn(5, 160, generator=rng).half()
    experts = prepare_experts(
        w.to(device), ws.to(device), layout, activation_format="float16", backend=backend
    )
    ids = route(5, 2, 3, "spread", rng)
    groups = group_tokens(ids.to(device), 3)
    got = expert_linear(x.to(device), experts, groups, top_k=2).cpu()
    order = ids.flatten().sort(stable=True)
    for row, slot, expert in zip(got, order.indices, order.values, strict=True):
        want = exact(x[slot // 2][None], torch.ones(1, 3), w[expert], ws[expert], layout)[0]
        assert (row.double() - want).norm() / want.norm() <= 4e-4


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floating_point_experts(dtype, has_bias, device):
    rng = torch.Generator().manual_seed(4)
    x, w = torch.randn(9, 48, generator=rng), torch.randn(5, 40, 48, generator=rng)
    x, w = x.to(dtype), w.to(dtype)
    bias = torch.randn(5, 40, generator=rng).to(dtype) if has_bias else None
    ids = route(9, 3, 5, "none to the first", rng)
    groups = group_tokens(ids.to(device), 5)
    options = {} if bias is None else {"bias": bias.to(device)}
    got = expert_linear(x.to(device), w.to(device), groups, top_k=3, **options).cpu()
    order = ids.flatten().sort(stable=True)
    want = torch.einsum("pk,pnk->pn", x[order.indices // 3].double(), w[order.values].double())
    if bias is not None:
        want += bias[order.values].double()
    # 48 products in float32, rounded to the dtype once.
    bound = 1e-6 if dtype is torch.float32 else 5e-4
    assert got.dtype is dtype
    assert (got.double() - want).norm() / want.norm() <= bound


def test_codes_under_floating_point_experts_are_dequantized(device):
    problem = Problem.make(GroupLayout(128, 64), 6, 2, 3, 40, "spread")
    spec = QuantizeSpec(layout=problem.layout)
    mixed = pack_values(problem.x.to(device), problem.xs.to(device), spec, torch.float32)
    real = problem.w.view(3, 40, 2, 64) * problem.ws.unsqueeze(3)
    groups = group_tokens(problem.ids.to(device), 3)
    weights = real.view(3, 40, 128).to(device)
    got = expert_linear(mixed, weights, groups, top_k=2, bias=problem.bias.to(device))
    assert torch.equal(got.cpu().double(), problem.want())


def test_errors_name_the_numbers_and_the_remedy():
    layout = GroupLayout(64, 64, 32)
    w, ws = torch.ones(3, 8, 96), torch.ones(3, 8, 2).half()
    with pytest.raises(ShapeError, match=r"values \(E, N, 96\).*got \(3, 8, 64\)"):
        prepare_experts(w[:, :, :64], ws, layout)
    with pytest.raises(ShapeError, match=r"of at least one expert.*got \(0, 8, 96\)"):
        prepare_experts(w[:0], ws[:0], layout)
    with pytest.raises(ShapeError, match=r"scales \(3, 8, 2\).*got \(2, 8, 2\)"):
        prepare_experts(w, ws[:2], layout)
    with pytest.raises(ShapeError, match=r"bias \(3, 8\); got \(8,\)"):
        prepare_experts(w, ws, layout, bias=torch.ones(8))
    with pytest.raises(BackendError, match=r"experts cannot run on backend cpu: it multiplies"):
        prepare_experts(w, ws, layout, activation_format="e4m3", backend=Backend.CPU)
    with pytest.raises(BackendError, match=r"experts has no backend 'cublas'"):
        prepare_experts(w, ws, layout, backend=Backend.CUBLAS)
    experts = prepare_experts(w, ws, layout)
    spec = experts.input_spec(QuantizeSpec(layout=layout))
    mixed = pack_values(torch.ones(2, 96), torch.ones(2, 2), spec, torch.float16)
    ids = torch.zeros(2, 2, dtype=torch.int32)
    groups = group_tokens(ids, 3)
    with pytest.raises(ShapeError, match=r"\(2, 96\) rows of x with top_k None.* the 4 positions"):
        expert_linear(mixed, experts, groups, top_k=None)
    with pytest.raises(ShapeError, match=r"grouped for 4 experts.*those of 3"):
        expert_linear(mixed, experts, group_tokens(ids, 4), top_k=2)
    with pytest.raises(ShapeError, match=r"give it to prepare_experts"):
        expert_linear(mixed, experts, groups, top_k=2, bias=torch.ones(3, 8))
    with pytest.raises(ShapeError, match=r"quantize x first"):
        expert_linear(torch.ones(2, 96), experts, groups, top_k=2)
    with pytest.raises(ShapeError, match=r"weights \(3, N, K\).*got \(2, 8, 96\)"):
        expert_linear(torch.ones(2, 96), w[:2], groups, top_k=2)
    with pytest.raises(ShapeError, match=r"expected x \(T, 96\).*got \(2, 64\)"):
        expert_linear(torch.ones(2, 64), w, groups, top_k=2)
    with pytest.raises(ShapeError, match=r"expected bias \(3, 8\); got \(8,\)"):
        expert_linear(torch.ones(2, 96), w, groups, top_k=2, bias=torch.ones(8))
    with pytest.raises(ShapeError, match=r"expert_ids \(T, k\).*got \(4,\) of 3"):
        group_tokens(ids.flatten(), 3)
    with pytest.raises(ShapeError, match=r"of 4 slots; got \(3, 8\) and \(2, 2\)"):
        combine(torch.ones(3, 8), groups, torch.ones(2, 2))


def test_a_whole_layer_equals_its_experts_token_by_token(device):
    """Route, gather, two products, weighted sum: against a loop over tokens."""
    rng = torch.Generator().manual_seed(12)
    tokens, k, experts, hidden, inner = 7, 2, 4, 32, 24
    x = torch.randn(tokens, hidden, generator=rng)
    up = torch.randn(experts, inner, hidden, generator=rng)
    down = torch.randn(experts, hidden, inner, generator=rng)
    routing = Routing(
        route(tokens, k, experts, "spread", rng), torch.rand(tokens, k, generator=rng)
    )
    groups = group_tokens(routing.expert_ids.to(device), experts)
    h = expert_linear(x.to(device), up.to(device), groups, top_k=k).relu()
    y = expert_linear(h, down.to(device), groups, top_k=None)
    got = combine(y, groups, routing.weights.to(device)).cpu()
    for t in range(tokens):
        want = sum(
            routing.weights[t, j] * ((x[t] @ up[e].t()).relu() @ down[e].t())
            for j, e in enumerate(routing.expert_ids[t].tolist())
        )
        torch.testing.assert_close(got[t], want, rtol=1e-4, atol=1e-4)  # float32 sums reordered
