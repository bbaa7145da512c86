"""The limits against arithmetic by hand, and against the table of Llama-2-7B's floors."""

import pytest

from quatom.benchmark.model_shapes import find_shape
from quatom.benchmark.roofline import Ceilings, Queries, Roofline, Work
from quatom.plan import plan
from quatom.presets import PRESETS
from quatom.recipe_file import changed

SPEC = Ceilings(copy_tb_s=3.35, bf16_tflops=989.0, low_bit_tflops=1979.0)
LLAMA = find_shape("llama-2-7b")
LINEARS = 6_476_005_376  # 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def roofline(recipe, config=LLAMA, ceilings=SPEC):
    return Roofline.of(plan(config, PRESETS[recipe]), ceilings)


def test_what_a_model_moves():
    half = roofline("fp16")
    assert half.linear_weights == LINEARS
    assert half.linear_bytes == 2 * LINEARS
    assert half.head_weights == 32000 * 4096
    assert half.kv_bytes == 512 * 1024  # 2 * 32 * 128 numbers * 2 bytes * 32 layers
    assert half.attention_flops == 4 * 32 * 128 * 32
    assert half.linear_tflops == 989.0
    atom = roofline("atom-w4a4kv4")
    assert atom.kv_bytes == 136 * 1024  # 64 bytes of codes and 4 of scale and minimum, 64 heads
    assert atom.linear_tflops == 1979.0
    # 4.2 bits a weight: 4-bit codes, one scale of 16 bits for 256 of them, 128 channels of 8 bits
    assert 4.1 < atom.linear_bytes * 8 / LINEARS < 4.3
    assert roofline("w4a16").linear_tflops == 989.0
    assert roofline("w8a8").linear_tflops == 1979.0
    assert roofline("fp16", find_shape("llama-3-8b")).kv_bytes == 128 * 1024


def test_what_layers_of_other_formats_move():
    half = {"layers": "0-15", "kv_cache": {"format": "int8"}}
    mixed = changed(PRESETS["atom-w4a4kv4"], {"overrides": [half]})
    # 132 bytes of an INT8 head of 128, 68 of an INT4 one.
    assert Roofline.of(plan(LLAMA, mixed), SPEC).kv_bytes == (136 + 264) / 2 * 1024
    floats = {
        "layers": "3",
        "sites": ["o"],
        "activations": {"format": "float16", "clip_ratio": 1.0},
    }
    mixed = changed(PRESETS["atom-w4a4kv4"], {"overrides": [floats]})
    assert Roofline.of(plan(LLAMA, mixed), SPEC).linear_tflops == 989.0


@pytest.mark.parametrize(
    ("recipe", "batch", "tokens_per_second"),
    [  # floors published for these sizes at 3.35 TB/s and context 1024, with a scale for each row
        ("fp16", 1, 244),
        ("fp16", 64, 4507),
        ("w8a8", 16, 3496),
        ("w4a16", 32, 5159),
        ("atom-w4a4kv4", 1, 874),
        ("atom-w4a4kv4", 64, 16730),
    ],
)
def test_decode_floors(recipe, batch, tokens_per_second):
    step = roofline(recipe).decode_step(batch, 1024)
    # 2 %: one scale for two rows saves 0.06 of 4.2 bits; the new token's own KV adds 0.1 %
    assert batch / step == pytest.approx(tokens_per_second, rel=0.02)


def test_a_decode_step_by_hand():
    step = roofline("fp16").decode_step(64, 1000)
    linears = 2 * LINEARS / 3.35e12  # 3.87 ms; 64 tokens at 989 TFLOPS would take 0.84 ms
    head = 2 * 32000 * 4096 / 3.35e12
    kv = (64 * 1000 + 64) * 512 * 1024 / 3.35e12
    assert step == pytest.approx(linears + head + kv, rel=1e-12)


def test_large_batches_are_bound_by_operations():
    model = roofline("fp16")
    work = Work(1, 1, (Queries(0, 4096),))
    phases = model.phases(work)
    assert phases["linears"] == pytest.approx(2 * LINEARS * 4096 / 989e12, rel=1e-12)
    assert phases["head"] == pytest.approx(2 * 32000 * 4096 / 3.35e12, rel=1e-12)
    pairs = 4096 * 4097 / 2 * 4 * 32 * 128 * 32 / 989e12
    assert phases["attention"] == pytest.approx(pairs, rel=1e-12)
    assert model.seconds(work) == sum(phases.values())


def test_a_whole_run_by_hand():
    model = roofline("atom-w4a4kv4")
    # Two requests of 10 + 3 tokens at once: the prompts' own steps give each its first token, two
    # decode steps the rest, over 10 and 11 cached tokens.
    queries = (Queries(0, 10, 2), Queries(10, 2, 2, decoded=True))
    work = Work(steps=2, sampled=6, queries=queries)
    assert work.tokens == 2 * (10 + 2)
    assert sum(q.pairs(None) for q in queries) == 2 * (55 + 11 + 12)
    assert [q.cached_read(None) for q in queries] == [0, 2 * (10 + 11)]
    assert model.run([(10, 3), (10, 3)], concurrent=2) == pytest.approx(model.seconds(work))
    # One at a time reads the weights twice as often.
    alone = model.run([(10, 3), (10, 3)], concurrent=1)
    more = 2 * (model.linear_bytes + 2 * model.head_weights) / 3.35e12
    assert alone - model.seconds(work) == pytest.approx(more, rel=1e-9)
    # A prompt alone reads them once.
    assert model.run([(10, 1)], 1) == pytest.approx(model.seconds(Work(1, 1, (Queries(0, 10),))))


def test_ceilings_of_a_gpu_without_fp8():
    assert Ceilings.from_environment({"copy_tb_s": 2.0, "bf16_tflops": 300.0}) == Ceilings(
        2.0, 300.0, 600.0
    )
    measured = {"copy_tb_s": 3.0, "bf16_tflops": 760.0, "fp8_tflops": 1450.0}
    assert Ceilings.from_environment(measured).low_bit_tflops == 1450.0


def test_a_step_reads_the_experts_that_its_tokens_touch():
    mixtral = roofline("fp16", find_shape("mixtral-8x7b"))
    expert = 3 * 4096 * 14336  # weights of one expert
    attention = 2 * 4096 * (4096 + 1024)
    assert mixtral.linear_weights == pytest.approx(32 * (attention + 2 * expert), rel=1e-12)
    assert mixtral.linear_bytes == 2 * 32 * (attention + 8 * expert)
    # One token touches 2 of 8; two touch 8 (1 - (3 / 4) ** 2) = 3.5; many touch all.
    for tokens, touched in [(1, 2), (2, 3.5), (1000, 8)]:
        read = 2 * 32 * (attention + touched * expert)
        assert mixtral.bytes_read(tokens) == pytest.approx(read, rel=1e-12)
    step = mixtral.decode_step(2, 100)
    head = 2 * 32000 * 4096
    kv = (2 * 100 + 2) * 2 * 2 * 8 * 128 * 32
    assert step == pytest.approx((mixtral.bytes_read(2) + head + kv) / 3.35e12, rel=1e-12)
    assert roofline("fp16").bytes_read(1) == roofline("fp16").linear_bytes


@pytest.mark.parametrize(("first", "count"), [(0, 3), (0, 20), (4, 10), (7, 1), (8, 1), (30, 4)])
@pytest.mark.parametrize("window", [None, 1, 8, 100])
def test_queries_see_no_more_than_their_window(first, count, window):
    seen = [min(first + i + 1, window or 10**9) for i in range(count)]
    queries = Queries(first, count, 3, decoded=True)
    assert queries.pairs(window) == 3 * sum(seen)
    assert queries.cached_read(window) == 3 * sum(n - 1 for n in seen)


def test_layers_with_a_window_read_no_more_than_it():
    config = find_shape("gpt-oss-20b")
    model = roofline("quatom-w4a4kv4", config)
    assert model.windows == pytest.approx({128: 0.5, None: 0.5})
    # 8 heads of K and V, 32 bytes of codes and 4 of scale and minimum each, in 24 layers.
    assert model.kv_bytes == 24 * 8 * 2 * 36
    step = model.phases(Work.decode(64, 1000))
    kv = 64 * ((1000 + 127) / 2 + 1) * model.kv_bytes
    assert step["attention"] == pytest.approx(kv / 3.35e12, rel=1e-12)
    # 64 tokens choose 4 of 32 experts each: all but a few thousandths of them are touched.
    experts = 24 * 32 * 3 * 2880 * 2880
    attention = 24 * 2880 * (2 * 4096 + 2 * 512)
    assert model.linear_weights == pytest.approx(attention + experts / 8, rel=1e-12)
    assert model.linear_bytes == pytest.approx((attention + experts) * 4.3 / 8, rel=0.03)
    assert model.bytes_read(64) == pytest.approx(model.linear_bytes, rel=1e-3)
