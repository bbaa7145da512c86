"""The Hopper kernel of expert_linear: what its compiler makes of it, and on a GPU its results."""

import dataclasses
import re

import pytest
import torch
from tests.ops.test_cuda_build import disassemble
from tests.ops.test_experts import Problem, route
from tests.ops.test_linear import random_codes

from quatom.errors import BackendError
from quatom.numerics.groups import GroupLayout
from quatom.numerics.multiples import find_row_scales, nearest_multiple
from quatom.ops import cuda_build
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.experts import expert_linear, group_tokens, prepare_experts
from quatom.ops.experts.configs import CONFIGS, choose_expert_config, expected_tiles
from quatom.ops.experts.cuda import arrange_source, experts_cuda
from quatom.ops.linear.configs import Config
from quatom.ops.linear.cuda import defines, kernel_source


@pytest.fixture
def nvrtc(tmp_path, monkeypatch):
    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    try:
        cuda_build._nvrtc()
    except BackendError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")


def test_the_arranging_reads_results_after_the_wait_for_them(nvrtc, tmp_path):
    sass = disassemble(compile_cubin(arrange_source(), "sm_90a"), tmp_path)
    before, wait, after = sass.partition("ACQBULK")
    assert wait
    assert "LDG" not in before
    assert "LDG.E.128" in after
    assert "CONSTANT" not in after  # no load that the compiler may move


@pytest.mark.parametrize(
    "config",
    [Config(16, 1, ctas_per_sm=3, integer=True), Config(192, 2, parts=2, integer=True)],
    ids=str,
)
def test_steps_are_those_of_the_dense_kernel(config, nvrtc, tmp_path):
    config = dataclasses.replace(config, experts=True)
    source = kernel_source(config.columns)
    sass = disassemble(compile_cubin(source, "sm_90a", defines(config, torch.float16)), tmp_path)
    # As in test_linear_build: one thread copies, and nothing is spilled between the products.
    assert "UBLKCP" in sass
    assert "BRA.U.ANY" not in sass
    assert "LDG" not in sass.partition("ACQBULK")[0]  # runs are the kernel before's results
    matrix = [m.start() for m in re.finditer(f"IGMMA.64x{config.columns}x32", sass)]
    assert len(re.findall(r"\b(LDL|STL)\b", sass[matrix[0] : matrix[-1]])) <= 4


def test_expected_tiles_are_those_of_random_routings():
    rng = torch.Generator().manual_seed(0)
    for mean, tile_rows, in_place in ((0.3, 8, False), (16, 32, True), (64, 64, False)):
        rows = torch.poisson(torch.full((20_000,), float(mean)), generator=rng)
        early = torch.randint(16, rows.shape, generator=rng) * in_place
        tiles = torch.where(rows > 0, ((rows + early) / tile_rows).ceil(), 0).mean().item()
        # 0.01 is three standard errors of 20,000 runs; the normal distribution errs by as much.
        assert abs(expected_tiles(mean, tile_rows, in_place=in_place) - tiles) < 0.03


@pytest.mark.parametrize(
    ("positions", "experts", "row_blocks", "units", "in_place", "tokens"),
    [
        (512, 128, 24, 17, False, 8),  # Qwen3-30B-A3B, gate and up, 64 tokens
        (128, 8, 448, 33, False, 32),  # Mixtral-8x7B, gate and up, 64 tokens
        (128, 8, 64, 113, True, 64),  # and down: a run may begin amid 16 rows
        (8192, 8, 64, 113, True, 192),
    ],
)
def test_the_choice_follows_the_rows_of_an_expert(
    positions, experts, row_blocks, units, in_place, tokens
):
    found = choose_expert_config(
        positions, experts, row_blocks, units, 132, integer=True, in_place=in_place
    )
    assert found.tokens == tokens
    assert found in CONFIGS


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "scale_mode"), [("int8", "row"), ("int4", "multiples"), ("int4", "group")]
)
@pytest.mark.parametrize("kind", ["spread", "one expert", "none to the first"])
@pytest.mark.parametrize(
    "layout", [GroupLayout(384, 128, 128), GroupLayout(288, 96), GroupLayout(160, 64, 96, 3)]
)
def test_every_configuration_is_exact(layout, kind, fmt, scale_mode, device):
    problem = Problem.make(layout, 150, 3, 5, 196, kind, fmt=fmt, scale_mode=scale_mode)
    want = problem.want().half()
    experts = problem.prepare(Backend.CUDA, device)
    groups = group_tokens(problem.ids.to(device), 5)
    by_token = problem.mixed(experts, device)
    in_order = problem.mixed(experts, device, groups.slots.cpu().long() // 3)
    integer = scale_mode != "group"
    for config in CONFIGS:
        if config.integer != integer:
            continue
        got = experts_cuda(by_token, experts, groups, 3, config)
        assert torch.equal(got.cpu(), want), config
        got = experts_cuda(in_order, experts, groups, None, config)
        assert torch.equal(got.cpu(), want), config


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "scale_mode"),
    [("int8", "row"), ("int4", "multiples"), ("int4", "group"), ("e4m3", "group")],
)
@pytest.mark.parametrize("tokens", [1, 16, 64, 700, 8192])
@pytest.mark.parametrize(
    ("experts", "k", "rows", "normal", "outliers"),
    [(8, 2, 512, 3968, 128), (128, 8, 1536, 1920, 128), (32, 4, 2880, 2816, 64)],
)
def test_shapes_of_models(experts, k, rows, normal, outliers, tokens, fmt, scale_mode, device):
    layout = GroupLayout(normal, 128, outliers)
    rng = torch.Generator(device=device).manual_seed(tokens + experts)

    def scales(*shape):
        return (torch.rand(shape, generator=rng, device=device) * 0.01 + 1e-3).half().float()

    x = random_codes(tokens, layout, fmt, rng)
    w = torch.stack([random_codes(rows, layout, "int4", rng) for _ in range(experts)])
    xs, ws = scales(tokens, layout.num_scales), scales(experts, rows, layout.num_scales)
    own = xs[:, : layout.num_normal_groups]
    if scale_mode == "row":
        own.copy_(xs[:, :1].expand_as(own))
    elif scale_mode == "multiples":
        own.copy_(nearest_multiple(own, find_row_scales(own, 16).unsqueeze(1)))
    if scale_mode != "group":
        ws = nearest_multiple(ws, find_row_scales(ws.flatten(0, 1), 13).view(experts, rows, 1))
    bias = scales(experts, rows)
    prepared = prepare_experts(
        w, ws.half(), layout, bias=bias, activation_format=fmt, scale_mode=scale_mode
    )
    assert prepared.backend is Backend.CUDA
    spec = prepared.input_spec(QuantizeSpec(layout=layout, normal=fmt, scale_mode=scale_mode))
    mixed = pack_values(x, xs, spec, torch.float16)
    ids = route(tokens, k, experts, "spread", torch.Generator().manual_seed(1)).to(device)
    groups = group_tokens(ids, experts)
    y = expert_linear(mixed, prepared, groups, top_k=k)
    again = expert_linear(mixed, prepared, groups, top_k=k)
    assert torch.equal(y, again)
    real = mixed.dequantize()
    error = total = 0.0
    bounds = groups.offsets.tolist()
    for e in range(experts):
        own_rows = slice(bounds[e], bounds[e + 1])
        weights = w[e].double() * _expand(ws[e], layout)
        want = real[groups.slots[own_rows].long() // k].double() @ weights.t() + bias[e].double()
        error += (y[own_rows].double() - want).square().sum().item()
        total += want.square().sum().item()
    # As of the dense kernel; int4 codes lose nothing but the float16 rounding of the result.
    assert (error / total) ** 0.5 <= (2e-3 if fmt == "e4m3" else 4e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_down_takes_the_tiles_that_gate_up_arranged(tokens, device):
    first = Problem.make(GroupLayout(256, 128, 128), tokens, 2, 6, 128, "spread")
    then = Problem.make(GroupLayout(384, 128, 128), tokens * 2, 1, 6, 196, "spread")
    experts, following = (problem.prepare(Backend.CUDA, device) for problem in (first, then))
    ids, x = first.ids.to(device), first.mixed(experts, device)
    rows = then.mixed(following, device)
    apart = group_tokens(ids, 6)
    want = (
        expert_linear(x, experts, apart, top_k=2),
        expert_linear(rows, following, apart, top_k=None),
    )
    assert not apart.tiles
    together = group_tokens(ids, 6)
    got = expert_linear(x, experts, together, top_k=2, following=following)
    assert torch.equal(got, want[0])
    assert together.tiles
    assert torch.equal(expert_linear(rows, following, together, top_k=None), want[1])


def _expand(scales, layout):
    sizes = torch.tensor(layout.group_sizes, device=scales.device)
    return scales.double().repeat_interleave(sizes, dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [Backend.CUDA, Backend.TRITON])
@pytest.mark.parametrize("gathered", [True, False])
def test_a_captured_graph_follows_another_routing(backend, gathered, device):
    problem = Problem.make(GroupLayout(256, 128, 128), 40, 2, 6, 128, "spread")
    experts = problem.prepare(backend, device)
    k = 2 if gathered else None
    rows = None if gathered else torch.arange(80) // 2  # whatever they are, each has its place
    mixed = problem.mixed(experts, device, rows)
    ids = problem.ids.to(device)

    def run():
        groups = group_tokens(ids, 6)
        return groups, expert_linear(mixed, experts, groups, top_k=k)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, y = run()
    for kind in ("one expert", "one each", "none to the first"):
        ids.copy_(route(40, 2, 6, kind, torch.Generator().manual_seed(2)))
        graph.replay()
        assert torch.equal(y.clone(), run()[1])
