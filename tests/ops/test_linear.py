"""linear: every backend against exact arithmetic, on every scheme and on awkward shapes.

Three kinds of checks, from the sharpest to the broadest: integer codes with power-of-two scales
(all backends equal float64 bit for bit), one element at a time (an index fault moves it), random
scales with outliers (relative error, no worse than the reference's rounding allows).
"""

import dataclasses

import pytest
import torch

from quatom.errors import BackendError, ShapeError
from quatom.numerics.groups import GroupLayout, expand_scales
from quatom.numerics.multiples import find_row_scales, nearest_multiple
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.backend import Backend
from quatom.ops.linear import linear, prepare_weights

INTEGER_RANGES = {"int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int8": (-128, 127)}
CUDA = pytest.param(Backend.CUDA, marks=pytest.mark.gpu)
CPU = pytest.param(
    Backend.CPU,
    marks=pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs AVX-512 VNNI"),
)
BACKENDS = [Backend.REFERENCE, CPU, Backend.TRITON, CUDA]

LAYOUTS = {
    "llama-like": GroupLayout(384, 128, 128),
    "SmolLM2": GroupLayout(512, 128, 64),
    "short last group, three outlier blocks": GroupLayout(160, 64, 96, 3),
    "no outliers, odd groups": GroupLayout(192, 96),
    "groups of 32": GroupLayout(96, 32, 32),
}


def random_codes(rows, layout, fmt, rng, fill=None):
    """Codes (rows, K) float32: `fmt` in normal groups, int8 outliers."""
    shape = (rows, layout.normal)
    if fmt == "e4m3":
        normal = (
            (torch.randn(shape, generator=rng, device=rng.device) * 100)
            .clamp(-448, 448)
            .to(torch.float8_e4m3fn)
            .float()
        )
    elif fmt == "float16":
        normal = torch.randint(-64, 64, shape, generator=rng, device=rng.device).float() / 16
    else:
        low, high = INTEGER_RANGES[fmt]
        normal = torch.randint(low, high + 1, shape, generator=rng, device=rng.device).float()
    if fill is not None:
        normal.fill_(fill)
    size = (rows, layout.outliers)
    outliers = torch.randint(-128, 128, size, generator=rng, device=rng.device).float()
    return torch.cat((normal, outliers), dim=1)


def run(x, xs, w, ws, layout, backend, device, *, fmt="int4", weight="int4", bias=None, **options):
    """Put both operands into the backend's layout, poison the output's memory, multiply."""
    if backend is Backend.CPU:
        device = "cpu"
    spec = QuantizeSpec(layout=layout, normal=fmt, scale_mode=options.get("scale_mode", "group"))
    prepared = prepare_weights(
        w.to(device),
        ws.half().to(device),
        layout,
        bias=None if bias is None else bias.to(device),
        weight_format=weight,
        activation_format=fmt,
        scale_mode=spec.scale_mode,
        backend=backend,
    )
    dtype = options.get("dtype", torch.float16)
    mixed = pack_values(x.to(device), xs.to(device), prepared.input_spec(spec), dtype)
    # The allocator hands the same block out again: an element that is not written stays NaN.
    poison = torch.full((x.shape[0], w.shape[0]), torch.nan, dtype=dtype, device=device)
    del poison
    return linear(mixed, prepared).cpu()


def exact(x, xs, w, ws, layout, bias=None):
    """The product in float64."""
    real = [v.double() * expand_scales(s, layout).double() for v, s in ((x, xs), (w, ws))]
    product = real[0] @ real[1].t()
    return product if bias is None else product + bias.double()


def powers_of_two(rows, layout, rng, low, high):
    return 2.0 ** torch.randint(low, high, (rows, layout.num_scales), generator=rng).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (5, 72), (17, 132)])
def test_w4a4_with_power_of_two_scales_is_exact(backend, layout, tokens, channels, device):
    rng = torch.Generator().manual_seed(tokens)
    x = random_codes(tokens, layout, "int4", rng)
    w = random_codes(channels, layout, "int4", rng)
    xs, ws = (powers_of_two(n, layout, rng, -6, -2) for n in (tokens, channels))
    bias = torch.randint(-8, 8, (channels,), generator=rng).float()
    got = run(x, xs, w, ws, layout, backend, device, bias=bias)
    want = exact(x, xs, w, ws, layout, bias)
    # Every partial sum is a multiple of 2**-12 below 2**12 (three outlier groups of 2**21 * 2**-6):
    # float32 holds it exactly, so one rounding to float16 is all that happens.
    assert torch.equal(got, want.half())


def multiples(rows, layout, rng, low, high):
    """Scales of normal groups 1 to 16 times a power of two of the row; outliers' are powers."""
    scales = powers_of_two(rows, layout, rng, low, high)
    groups = layout.num_normal_groups
    counts = torch.randint(1, 17, (rows, groups), generator=rng)
    scales[:, :groups] = scales[:, :1] * counts
    return scales


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (5, 72), (17, 132)])
@pytest.mark.parametrize(("fmt", "scale_mode"), [("int8", "row"), ("int4", "multiples")])
def test_integers_under_one_scale_a_row_are_exact(
    backend, layout, fmt, scale_mode, tokens, channels, device
):
    rng = torch.Generator().manual_seed(tokens)
    x = random_codes(tokens, layout, fmt, rng)
    w = random_codes(channels, layout, "int4", rng)
    xs = powers_of_two(tokens, layout, rng, -6, -3)
    if scale_mode == "row":
        xs[:, : layout.num_normal_groups] = xs[:, :1]
    else:
        xs = multiples(tokens, layout, rng, -6, -3)
    ws = multiples(channels, layout, rng, -8, -6)
    got = run(x, xs, w, ws, layout, backend, device, fmt=fmt, scale_mode=scale_mode)
    # Sums are multiples of 2**-14; of random codes they stay below 2**8, a hundred times their
    # standard deviation (512 products of 74 * 5 * 10 * 2**-10): 22 bits, which float32 holds.
    assert torch.equal(got, exact(x, xs, w, ws, layout).half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x_fill", "w_fill"), [(-8.0, -8.0), (7.0, 7.0), (-8.0, 7.0)])
def test_extreme_codes_are_exact(backend, x_fill, w_fill, device):
    # A group of 128 products of -8 * -8 reaches 8192, the largest sum an FP8 accumulator must hold.
    layout = GroupLayout(384, 128, 128)
    rng = torch.Generator().manual_seed(0)
    x = random_codes(9, layout, "int4", rng, fill=x_fill)
    w = random_codes(64, layout, "int4", rng, fill=w_fill)
    xs, ws = torch.full((9, 4), 2.0**-4), torch.full((64, 4), 2.0**-4)
    got = run(x, xs, w, ws, layout, backend, device)
    assert torch.equal(got, exact(x, xs, w, ws, layout).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel_at_a_time_multiplies_its_own_weight(backend, device):
    layout = GroupLayout(96, 96, 32)
    rng = torch.Generator().manual_seed(1)
    w = random_codes(64, layout, "int4", rng)
    ws = torch.ones(64, 2)
    # Token k holds a single 1 in channel k: row k of the result is column k of the weights.
    got = run(torch.eye(128), torch.ones(128, 2), w, ws, layout, backend, device)
    assert torch.equal(got.float(), w.t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_scale_belongs_to_its_own_row_and_group(backend, device):
    layout = GroupLayout(96, 32, 64, 2)
    x, w = torch.zeros(9, 160), torch.zeros(64, 160)
    x[:, ::32] = 1.0  # one channel of each of the five groups
    w[:, ::32] = 1.0
    rng = torch.Generator().manual_seed(2)
    # Sums of five products below 20 * 20 are integers below 2048, which float16 holds.
    xs = torch.randint(1, 20, (9, 5), generator=rng).float()
    ws = torch.randint(1, 20, (64, 5), generator=rng).float()
    got = run(x, xs, w, ws, layout, backend, device)
    assert torch.equal(got.double(), xs.double() @ ws.double().t())


@pytest.mark.parametrize(
    ("backend", "weight", "fmt", "layout"),
    [
        *(
            (backend, weight, fmt, GroupLayout(192, 64, 64))
            for backend in (Backend.REFERENCE, Backend.TRITON)
            for weight, fmt in (
                ("int4", "int8"),
                ("int4", "e4m3"),
                ("int4", "float16"),
                ("int3", "int3"),
                ("int8", "int8"),
            )
        ),
        *(
            pytest.param(Backend.CPU, weight, fmt, layout, marks=CPU.marks)
            for weight, fmt, layout in (
                ("int4", "int8", GroupLayout(192, 64, 64)),
                ("int3", "int3", GroupLayout(192, 64, 64)),
                ("int2", "int4", GroupLayout(256, 128)),
                ("int8", "int8", GroupLayout(320, 320)),
            )
        ),
        (Backend.TRITON, "int8", "int8", GroupLayout(320, 320)),
        (Backend.TRITON, "int4", "int4", GroupLayout(320, 320)),
        (Backend.TRITON, "int4", "int8", GroupLayout(512, 256)),
        pytest.param(Backend.CUDA, "int4", "e4m3", GroupLayout(192, 64, 64), marks=pytest.mark.gpu),
        pytest.param(Backend.CUDA, "int3", "int3", GroupLayout(192, 64, 64), marks=pytest.mark.gpu),
        pytest.param(Backend.CUDA, "int2", "int4", GroupLayout(256, 128), marks=pytest.mark.gpu),
    ],
)
def test_every_scheme_has_the_accuracy_of_float32(backend, weight, fmt, layout, device):
    rng = torch.Generator().manual_seed(7)
    x = random_codes(6, layout, fmt, rng)
    w = random_codes(68, layout, weight, rng)
    xs = torch.rand(6, layout.num_scales, generator=rng).half().float() + 0.0625
    ws = (torch.rand(68, layout.num_scales, generator=rng) * 0.01).half().float() + 0.0009765625
    bias = torch.randn(68, generator=rng)
    got = run(x, xs, w, ws, layout, backend, device, fmt=fmt, weight=weight, bias=bias)
    want = exact(x, xs, w, ws, layout, bias)
    # Float16 output rounds by 2**-12 on average; the FP8 unit truncates e4m3 products to 14 bits.
    error = (got.double() - want).norm() / want.norm()
    assert error <= (2e-3 if fmt == "e4m3" and backend is Backend.CUDA else 4e-4)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_odd_integer_weights_under_a_plain_input_are_exact(backend, device):
    rng = torch.Generator().manual_seed(4)
    layout = GroupLayout(576, 576)
    x = torch.randint(-8, 8, (5, 576), generator=rng).half()
    w = 2.0 * torch.randint(-8, 8, (72, 576), generator=rng) + 1
    ws = powers_of_two(72, layout, rng, -8, -6)
    prepared = prepare_weights(
        w.to(device),
        ws.half().to(device),
        layout,
        weight_format="odd4",
        activation_format="float16",
        backend=backend,
    )
    # Sums of integers below 2**17, times a power of two: float32 holds them, float16 rounds once.
    want = (x.double() @ w.double().t()) * ws.double().t()
    assert torch.equal(linear(x.to(device), prepared).cpu(), want.half())


def test_other_backends_refuse_odd_integers_by_name():
    layout = GroupLayout(64, 64)
    w, ws = torch.ones(8, 64), torch.ones(8, 1).half()
    for backend, words in (
        (Backend.CPU, "multiplies integers of at most 8 bits, not odd4 and float16"),
        (Backend.CUDA, "Hopper GPU"),
        (Backend.CUBLAS, "needs a CUDA device"),
    ):
        with pytest.raises(BackendError, match=words):
            prepare_weights(
                w, ws, layout, weight_format="odd4", activation_format="float16", backend=backend
            )


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize(
    ("weight", "layout"),
    [
        ("int4", GroupLayout(384, 128, 128)),  # a block a group
        ("int8", GroupLayout(640, 640)),  # a split inside the one group
        ("int4", GroupLayout(544, 256, 64, 2)),  # two blocks a group, a short last one
    ],
)
def test_a_split_triton_product_is_exact(weight, layout, split, device):
    from quatom.ops.linear.triton import linear_triton

    rng = torch.Generator().manual_seed(split)
    x, w = random_codes(5, layout, weight, rng), random_codes(72, layout, weight, rng)
    # Sums of 640 products of INT8 codes reach 2**23.3 times 2**-14: float32 and float16 hold them
    # where scales are powers of two, up to the one rounding at the end.
    xs, ws = (powers_of_two(n, layout, rng, -8, -6) for n in (5, 72))
    bias = torch.randint(-8, 8, (72,), generator=rng).float()
    prepared = prepare_weights(
        w.to(device),
        ws.half().to(device),
        layout,
        weight_format=weight,
        activation_format=weight,
        backend=Backend.TRITON,
    )
    spec = QuantizeSpec(layout=layout, normal=weight)
    mixed = pack_values(x.to(device), xs.to(device), spec, torch.float16)
    got = linear_triton(mixed, prepared.tensors, layout, 72, bias.to(device), split=split)
    assert torch.equal(got.cpu(), exact(x, xs, w, ws, layout, bias).half())


@pytest.mark.parametrize("backend", [CPU])
@pytest.mark.parametrize("layout", [GroupLayout(544, 128, 32), GroupLayout(640, 32)])
def test_rows_on_a_cpu_do_not_see_each_other(backend, layout, device):
    rng = torch.Generator().manual_seed(9)
    x, w = (random_codes(n, layout, "int4", rng) for n in (150, 72))
    xs, ws = (torch.rand(n, layout.num_scales, generator=rng).half().float() for n in (150, 72))

    want = exact(x, xs, w, ws, layout)
    # Dot products are exact. Each of S groups is scaled twice and added: S + 2 roundings of at most
    # 2**-24 of the sum of absolute values, in whatever order.
    bound = exact(x.abs(), xs, w.abs(), ws, layout) * (layout.num_scales + 2) * 2.0**-24
    # 150 rows multiply in pieces of 32.
    for first, last in ((0, 150), (0, 1), (149, 150), (20, 60), (1, 14), (0, 32)):
        part = slice(first, last)
        got = run(x[part], xs[part], w, ws, layout, backend, device, dtype=torch.float32)
        assert ((got.double() - want[part]).abs() <= bound[part]).all()


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_w4a16_takes_plain_tensors(backend, dtype, device):
    layout = GroupLayout(160, 64)
    rng = torch.Generator().manual_seed(3)
    w = random_codes(40, layout, "int4", rng)
    ws = (torch.rand(40, 3, generator=rng) * 0.1).half()
    x = torch.randn(5, 160, generator=rng).to(dtype)
    prepared = prepare_weights(
        w.to(device), ws.to(device), layout, activation_format="float16", backend=backend
    )
    got = linear(x.to(device), prepared).cpu()
    want = x.double() @ (w.double() * expand_scales(ws, layout).double()).t()
    assert got.dtype is dtype
    tolerance = 4e-4 if dtype is torch.float16 else 4e-3
    assert (got.double() - want).norm() / want.norm() <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "scale_mode"),
    [("int4", "group"), ("e4m3", "group"), ("e4m3", "row"), ("int8", "row"), ("int4", "multiples")],
)
@pytest.mark.parametrize("tokens", [1, 7, 33, 64, 200, 1030])
@pytest.mark.parametrize(
    ("channels", "normal", "outliers"),
    [
        (576 + 2 * 192, 512, 64),  # SmolLM2-135M: fused QKV
        (1152, 864, 32),  # Qwen2.5-0.5B: fused QKV
        (896, 4864 - 128, 128),
        (11008 * 2, 3968, 128),  # Llama-7B: fused gate and up
        (4096, 10880, 128),
        (100, 256, 0),
    ],
)
def test_hopper_shapes(tokens, channels, normal, outliers, fmt, scale_mode, device):
    layout = GroupLayout(normal, 128, outliers)
    rng = torch.Generator(device=device).manual_seed(tokens + channels)

    def uniform(*shape):
        return torch.rand(shape, generator=rng, device=device)

    x = random_codes(tokens, layout, fmt, rng)
    w = random_codes(channels, layout, "int4", rng)
    xs = (uniform(tokens, layout.num_scales) * 0.01 + 1e-3).half().float()
    normal_scales = xs[:, : layout.num_normal_groups]
    if scale_mode == "row":
        normal_scales.copy_(xs[:, :1].expand_as(normal_scales))
    elif scale_mode == "multiples":
        row_scales = find_row_scales(normal_scales, 16).unsqueeze(1)
        normal_scales.copy_(nearest_multiple(normal_scales, row_scales))
    ws = (uniform(channels, layout.num_scales) * 0.01 + 1e-3).half().float()
    if fmt == "int8" or scale_mode == "multiples":
        ws = nearest_multiple(ws, find_row_scales(ws, 13).unsqueeze(1))
    bias = uniform(channels) - 0.5
    options = {"fmt": fmt, "scale_mode": scale_mode, "bias": bias}
    got, again = (run(x, xs, w, ws, layout, Backend.CUDA, device, **options) for _ in range(2))
    assert torch.equal(got, again), "split k must add up in a fixed order"
    want = exact(x, xs, w, ws, layout, bias).cpu()
    # The bar on random inputs; int4 codes lose nothing but the float16 rounding of the result.
    assert (got.double() - want).norm() / want.norm() <= (2e-3 if fmt == "e4m3" else 4e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "layout"),
    [
        ("int4", GroupLayout(512, 128, 128)),
        ("int8", GroupLayout(512, 128, 128)),
        ("int8", GroupLayout(41 * 128 - 64, 128)),  # more groups than any ring of stages has
    ],
    ids=str,
)
def test_every_configuration_of_the_hopper_kernel_is_exact(fmt, layout, device):
    from quatom.ops.linear.configs import CONFIGS
    from quatom.ops.linear.cuda import linear_cuda

    integer = fmt == "int8"
    scale_mode = "row" if integer else "group"
    rng = torch.Generator().manual_seed(5)
    w = random_codes(192, layout, "int4", rng)
    ws = (multiples if integer else powers_of_two)(192, layout, rng, -8, -6)
    prepared = prepare_weights(
        w.to(device),
        ws.half().to(device),
        layout,
        activation_format=fmt,
        scale_mode=scale_mode,
        backend=Backend.CUDA,
    )
    spec = prepared.input_spec(QuantizeSpec(layout=layout, normal=fmt, scale_mode=scale_mode))
    for tokens in (1, 64, 300):
        x = random_codes(tokens, layout, fmt, rng)
        xs = powers_of_two(tokens, layout, rng, -6, -3)
        if integer:
            xs[:, : layout.num_normal_groups] = xs[:, :1]
        mixed = pack_values(x.to(device), xs.to(device), spec, torch.float16)
        want = exact(x, xs, w, ws, layout).half()
        for config in CONFIGS:
            if config.integer != integer:
                with pytest.raises(BackendError, match="weights packed for"):
                    linear_cuda(mixed, prepared.tensors, 192, None, config)
                continue
            got = linear_cuda(mixed, prepared.tensors, 192, None, config)
            assert torch.equal(got.cpu(), want), config


@pytest.mark.gpu
@pytest.mark.parametrize("w_fill", [-8.0, 7.0])
@pytest.mark.parametrize("x_fill", [-128.0, 127.0])
def test_the_largest_products_of_int8_do_not_touch_their_neighbours(x_fill, w_fill, device):
    layout = GroupLayout(256, 128, 128)
    rng = torch.Generator().manual_seed(0)
    x = random_codes(9, layout, "int8", rng, fill=x_fill)
    w = random_codes(64, layout, "int4", rng, fill=w_fill)
    w[:, ::3] = 0.0  # bytes beside the largest ones
    ws = torch.full((64, 3), 2.0**-8)
    ws[:, 1] *= 16  # -8 * 16 is the least INT8 number
    xs = torch.full((9, 3), 2.0**-8)
    options = {"fmt": "int8", "scale_mode": "row"}
    got = run(x, xs, w, ws, layout, Backend.CUDA, device, **options)
    # 128 products of 2**14 and as many of 2**10, times 2**-16: 22 bits.
    assert torch.equal(got, exact(x, xs, w, ws, layout).half())


@pytest.mark.gpu
def test_scales_that_are_no_multiples_are_refused_by_the_integer_kernel(device):
    layout = GroupLayout(256, 128)
    w = torch.zeros(64, 256, device=device)
    ws = torch.tensor([17.0, 1.0], device=device).expand(64, 2).half() / 1024
    options = {"activation_format": "int8", "scale_mode": "row"}
    with pytest.raises(BackendError, match="multiples up to 17"):
        prepare_weights(w, ws, layout, backend=Backend.CUDA, **options)
    # Nobody asked for the kernel: any other that can.
    assert prepare_weights(w, ws, layout, **options).backend is not Backend.CUDA


@pytest.mark.gpu
def test_a_captured_graph_sees_new_inputs(device):
    layout = GroupLayout(384, 128, 128)
    rng = torch.Generator().manual_seed(6)
    w = random_codes(64, layout, "int4", rng).to(device)
    prepared = prepare_weights(w, torch.ones(64, 4, device=device).half() / 16, layout)
    spec = prepared.input_spec(QuantizeSpec(layout=layout))
    xs = torch.full((4, 4), 2.0**-4, device=device)
    mixed = pack_values(random_codes(4, layout, "int4", rng).to(device), xs, spec, torch.float16)
    linear(mixed, prepared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(mixed, prepared)
    x = random_codes(4, layout, "int4", rng)
    fresh = pack_values(x.to(device), xs, spec, torch.float16)
    mixed.codes.copy_(fresh.codes)
    mixed.scales.copy_(fresh.scales)  # they hold the correction for the codes' sum too
    graph.replay()
    want = exact(x, xs.cpu(), w.cpu(), torch.ones(64, 4) / 16, layout).half()
    assert torch.equal(y.cpu(), want)


def test_a_sum_that_int32_cannot_hold_is_refused(monkeypatch):
    from types import SimpleNamespace

    from quatom.ops.linear.choice import cuda_obstacle

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    formats = ("int4", "int8", "int8")
    for channels, fits in ((2**17 - 128, True), (2**17, False)):
        layout = GroupLayout(channels, 128, 128)
        values = SimpleNamespace(device=torch.device("cuda"), shape=(64, channels))
        scales = torch.ones(64, layout.num_scales).half()
        obstacle = cuda_obstacle(values, scales, layout, formats, "row")
        assert obstacle is None if fits else "131072 products" in obstacle


def test_packed_hopper_weights_hold_every_code_once():
    """Decode the packed bytes the way the kernel's registers do, without the packing code."""
    from quatom.ops.linear.hopper_layout import pack_weights

    layout = GroupLayout(128, 128)
    rng = torch.Generator().manual_seed(8)
    w = random_codes(64, layout, "int4", rng)
    packed = pack_weights(w, torch.rand(64, 1, generator=rng).half(), layout)[0][0, 0]
    for thread in range(0, 128, 7):
        warp, lane = divmod(thread, 32)
        for word in range(8):
            at = word // 4 * 2048 + thread * 16 + word % 4 * 4
            for half in range(2):
                row = 16 * warp + 4 * (lane // 8) + lane // 4 % 2 + 2 * half
                for byte in range(4):
                    value = (int(packed[at + byte]) >> 4 * half & 0xF) - 8
                    k = 32 * (word // 2) + 16 * (word % 2) + 4 * (lane % 4) + byte
                    assert value == w[row, k]


def test_packed_multiples_and_row_scales_stand_in_the_order_of_the_rows():
    from quatom.ops.linear.hopper_layout import pack_weights

    layout = GroupLayout(256, 128, 128)
    rng = torch.Generator().manual_seed(9)
    w = random_codes(100, layout, "int4", rng)
    ws = multiples(100, layout, rng, -9, -5).half()
    packed, row_scales = pack_weights(w, ws, layout, multiples=True)
    assert packed.shape == (2, 4, 4224)
    assert row_scales.shape == (2, 64)
    trailing = packed[:, :, 4096:].contiguous().view(torch.int16)
    for row in range(100):
        block, inside = divmod(row, 64)
        # A thread owns channels c, c + 2 of four: see the module's row order.
        warp, channel = divmod(inside, 16)
        place = 16 * warp + channel // 4 * 2 + channel % 2 + channel % 4 // 2 * 8
        scale = row_scales[block, place]
        assert torch.equal(trailing[block, :2, place] * scale, ws[row, :2].float())
        outlier = trailing[block, 2:, place].contiguous().view(torch.float16)
        assert torch.equal(outlier, ws[row, 2:].expand(2))
    assert (row_scales[0] > 0).all()
    assert (row_scales[1] > 0).sum() == 100 - 64


def test_no_tokens():
    layout = GroupLayout(64, 64)
    prepared = prepare_weights(torch.ones(8, 64), torch.ones(8, 1).half(), layout)
    spec = prepared.input_spec(QuantizeSpec(layout=layout))
    mixed = pack_values(torch.empty(0, 64), torch.empty(0, 1), spec, torch.float16)
    assert linear(mixed, prepared).shape == (0, 8)


def test_errors_name_the_numbers_and_the_remedy():
    layout = GroupLayout(64, 64, 32)
    w, ws = torch.ones(8, 96), torch.ones(8, 2).half()
    with pytest.raises(ShapeError, match=r"values \(N, 96\).*got \(8, 64\)"):
        prepare_weights(w[:, :64], ws, layout)
    with pytest.raises(ShapeError, match=r"scales \(8, 2\).*got \(8, 1\)"):
        prepare_weights(w, ws[:, :1], layout)
    with pytest.raises(ShapeError, match=r"bias \(8,\); got \(7,\)"):
        prepare_weights(w, ws, layout, bias=torch.ones(7))
    with pytest.raises(BackendError, match=r"weights must be integers, not e2m1; use the ref"):
        prepare_weights(w, ws, layout, weight_format="e2m1", backend=Backend.TRITON)
    with pytest.raises(BackendError, match=r"cannot run on backend cpu: it multiplies integers"):
        prepare_weights(w, ws, layout, activation_format="e4m3", backend=Backend.CPU)
    with pytest.raises(BackendError, match=r"outliers must be int8, not float16"):
        prepare_weights(w, ws, layout, outlier_format="float16", backend=Backend.TRITON)
    with pytest.raises(BackendError, match=r"Hopper GPU \(sm_90\), the weights are on cpu"):
        prepare_weights(w, ws, layout, backend=Backend.CUDA)
    prepared = prepare_weights(w, ws, layout)
    spec = prepared.input_spec(QuantizeSpec(layout=layout))
    mixed = pack_values(torch.ones(2, 96), torch.ones(2, 2), spec, torch.float16)
    with pytest.raises(ShapeError, match=r"x is a plain tensor.*int4: quantize x first"):
        linear(torch.ones(2, 96), prepared)
    with pytest.raises(ShapeError, match=r"expected x \(T, 96\).*got \(2, 64\)"):
        linear(torch.ones(2, 64), prepared)
    with pytest.raises(ShapeError, match=r"x is int4, the weights are prepared for.* e4m3"):
        linear(mixed, dataclasses.replace(prepared, activation_format="e4m3"))
    other = QuantizeSpec(layout=GroupLayout(96, 96))
    mixed = pack_values(torch.ones(2, 96), torch.ones(2, 1), other, torch.float16)
    with pytest.raises(ShapeError, match=r"quantize with prepared.input_spec"):
        linear(mixed, prepared)
