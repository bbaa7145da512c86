"""cuda_build: compiling without a GPU, the cache, errors, and what the compiler made of kernels."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from quatom.errors import BackendError
from quatom.families.spec import Norm
from quatom.numerics.groups import GroupLayout
from quatom.ops import cuda_build, cuda_quantize
from quatom.ops.activations import QuantizeSpec
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.quantize_variants import choose_variant

GLOBAL_WRITE = r"\b(STG|RED|ATOMG?)\b"
GLOBAL_ACCESS = r"\b(LDG|STG|RED|ATOMG?|UBLKCP)\b"
SOURCE = 'extern "C" __global__ void fill(int* out) { out[threadIdx.x] = VALUE; }'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    try:
        cuda_build._nvrtc()
    except BackendError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")


def disassemble(cubin: bytes, folder: Path) -> str:
    """SASS, by the nvdisasm of the CUDA toolkit or of Triton's wheel."""
    tool = shutil.which("nvdisasm")
    if tool is None:
        triton = pytest.importorskip("triton", reason="no nvdisasm, no Triton that ships one")
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        if not bundled.exists():
            pytest.skip(f"no nvdisasm on the path and none at {bundled}")
        tool = str(bundled)
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # Code alone, and no analysis of how it flows, which takes as long as the rest.
    command = [tool, "--print-code", "--no-dataflow", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_kernel_is_compiled_once_and_every_option_counts(tmp_path, monkeypatch):
    first = compile_cubin(SOURCE, "sm_80", {"VALUE": 1})
    assert first[:4] == b"\x7fELF"
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_cubin(SOURCE, "sm_80", {"VALUE": 1}) == first
    monkeypatch.undo()
    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    for arch, value in (("sm_80", 2), ("sm_90a", 1)):
        compile_cubin(SOURCE, arch, {"VALUE": value})
    assert len(list((tmp_path / "cubin").iterdir())) == 3


def test_an_error_carries_the_compiler_log():
    with pytest.raises(BackendError, match=r"VALUE.* undefined") as info:
        compile_cubin(SOURCE, "sm_80")
    assert "sm_80" in str(info.value)


def test_candidates_fit_the_chip():
    from quatom.ops.linear.configs import CONFIGS

    for config in CONFIGS:
        per_sm = config.ctas_per_sm * (config.shared_bytes + 1024)
        assert per_sm <= 228 * 1024, config
        assert config.num_stages >= 3, config
        assert config.split <= 8, config
        producer, consumer = config.registers
        if producer:  # setmaxnreg deadlocks if it asks for more than the launch gave
            given = 65536 // config.threads // 8 * 8 * config.threads
            assert producer * 128 + consumer * 128 * config.warpgroups <= given, config


@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 5000])
@pytest.mark.parametrize(("row_blocks", "units"), [(344, 33), (64, 87), (15, 3), (1, 1)])
@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_every_problem_gets_a_configuration(tokens, row_blocks, units, gpu):
    from quatom.ops.linear.configs import choose_config

    for integer in (False, True):
        config = choose_config(tokens, row_blocks, units, gpu, integer=integer)
        assert config.split <= units
        assert config.integer == integer


LAYER = {"LAYER": 1, "BIAS": 1}


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        (0, {}),
        (1, {"WEIGHT_OFFSET": 1}),
        (1, LAYER | {"TOKENS": 1, "ROTATE": 1}),
        (1, {"SUMMANDS": 8}),
        (1, {"SUMMANDS": 2, "TOKENS": 1, "WEIGHT_OFFSET": 1}),
        (2, {"GATED": 0, "ACTIVATION": 1}),
        (2, {"GATED": 1, "ACTIVATION": 2}),
        (2, {"GATED": 0, "ACTIVATION": 3}),
        (2, {"GATED": 1, "ACTIVATION": 4}),
        (2, {"GATED": 0, "ACTIVATION": 5}),
    ],
)
def test_the_quantize_kernel_moves_wide_words(operation, options, tmp_path):
    source = cuda_build.read_source("quatom.ops", "quantize.cu")
    constants = {"OPERATION": operation, "THREADS": 256, "TOKENS": 1 if operation == 2 else 2}
    constants |= {"VECTORS": 4, "ROUNDS": 2, "INPUT_BF16": 0, "E4M3": 0, "INT8": 0}
    constants |= {"ROTATE": 0, "BLOCK": 0, "KEEP": 0, "SUMMANDS": 0}
    constants |= {"WHOLE_TOKEN": 0, "MULTIPLES": 0, "CLUSTER": 1} | options
    sass = disassemble(compile_cubin(source, "sm_90a", constants), tmp_path)
    assert ("LDG.E.128" if operation == 2 else "LDG.E.64") in sass
    assert "STG.E.64" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("operation", ["reorder", "norm", "gated"])
def test_a_rotation_of_one_block_size_has_no_conditions(operation, tmp_path):
    """What a condition on the block costs: a select per sum, two moves per shuffle."""
    source = cuda_build.read_source("quatom.ops", "quantize.cu")
    layout, variant = GroupLayout(3968, 128, 128), cuda_quantize.Variant(512, 1)
    spec = QuantizeSpec(layout=layout, normal="int8", scale_mode="row", rotate=True)
    norm = Norm(eps=1e-5) if operation == "norm" else None
    constants = cuda_quantize.defines(operation, variant, spec, torch.float16, norm)
    assert constants["BLOCK"] == 128
    lengths = [
        len(re.findall(r"/\*[0-9a-f]{4,5}\*/", disassemble(cubin, tmp_path)))
        for cubin in (
            compile_cubin(source, "sm_90a", constants | {"BLOCK": block}) for block in (128, 0)
        )
    ]
    assert lengths[0] < 0.8 * lengths[1]


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (GroupLayout(512, 64, 64), 64),
        (GroupLayout(192, 96, 32), 32),
        (GroupLayout(224, 128, 32), 0),  # a last group of 96 channels, in blocks of 32
    ],
)
def test_a_rotation_knows_its_block_where_all_groups_are_alike(layout, block):
    spec = QuantizeSpec(layout=layout, rotate=True)
    variant = cuda_quantize.Variant(128, 1)
    assert cuda_quantize.defines("reorder", variant, spec, torch.float16)["BLOCK"] == block


@pytest.mark.parametrize(
    ("head_dim", "width", "kv", "norm"),
    [
        (80, 8, "int4", None),
        pytest.param(
            *(96, 4, "float16", Norm(eps=1e-6, weight_offset=1.0)), marks=pytest.mark.slow
        ),
        pytest.param(112, 8, "float16", None, marks=pytest.mark.slow),
        (128, 8, "int4", Norm(eps=1e-6)),
        pytest.param(192, 4, "int4", None, marks=pytest.mark.slow),
    ],
)
def test_the_append_kernel_keeps_heads_of_any_size_in_registers(
    head_dim, width, kv, norm, tmp_path
):
    from quatom.numerics.kv_pages import KVPages
    from quatom.ops.rope_append_kv.cuda import defines

    pages = KVPages.allocate(1, 16, 1, head_dim, kv, "cpu")
    constants = defines(pages, torch.bfloat16, width, rotate_keys=True, hadamard=True, norm=norm)
    source = cuda_build.read_source("quatom.ops.rope_append_kv", "append.cu")
    sass = disassemble(compile_cubin(source, "sm_90a", constants), tmp_path)
    assert f"LDG.E.{16 * width}" in sass
    # All that it reads may be the last kernel's result, all that it writes may be read by that one.
    assert not re.search(GLOBAL_ACCESS, sass.partition("ACQBULK")[0])
    assert not re.search(r"\b(LDL|STL)\b", sass)

    constants = defines(pages, torch.bfloat16, width, rotate_keys=True, hadamard=True, settled=True)
    sass = disassemble(compile_cubin(source, "sm_90a", constants), tmp_path)
    early = re.findall(r"LDG\S*", sass.partition("ACQBULK")[0])
    # Position and slot past the L1 cache, cosines and sines; q, k and v come later.
    assert sum("STRONG.GPU" in load for load in early) == 2
    assert len(early) == 2 + 2 * width // 4
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(
    ("head_dim", "row_tiles", "capability", "warps"),
    [
        pytest.param(64, 1, (9, 0), 4, marks=pytest.mark.slow),
        (80, 2, (9, 0), 4),
        pytest.param(96, 1, (9, 0), 4, marks=pytest.mark.slow),
        (112, 1, (8, 0), 4),
        (128, 1, (9, 0), 8),
        pytest.param(192, 1, (8, 0), 4, marks=pytest.mark.slow),
    ],
)
def test_the_decode_kernel_of_any_head_size_keeps_to_registers(
    head_dim, row_tiles, capability, warps, tmp_path
):
    from quatom.ops.attention.cuda import compile_decode, default_config

    config = default_config(head_dim, row_tiles, capability, warps)
    arch = "sm_{}{}".format(*capability)
    shape = (head_dim, 16, row_tiles)
    options = {"bf16": True, "softcap": True, "window": True, "sinks": True}
    cubin = compile_decode(arch, config, *shape, **options)
    sass = disassemble(cubin, tmp_path)
    assert ("UBLKCP" in sass) == (capability == (9, 0) and head_dim % 32 == 0)
    kernels = re.split(r"\.section\s+\.text\.", sass)[1:]
    assert len(kernels) == 2  # decode and merge
    for kernel in kernels:
        before, waits, _ = kernel.partition("ACQBULK")
        assert bool(waits) == config.bulk
        assert not waits or not re.search(GLOBAL_ACCESS, before)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    if not config.bulk:
        return

    cubin = compile_decode(arch, config, *shape, **options, settled=True, stream=True)
    sass = disassemble(cubin, tmp_path)
    early, wait, _ = sass.partition("\n.text.decode:")[2].partition("ACQBULK")
    assert wait
    # Lengths and block tables past the L1 cache, the first tiles; queries come later.
    assert all("STRONG.GPU" in load for load in re.findall(r"LDG\S*", early))
    assert early.count("UBLKCP") == config.stages
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(("block_size", "whole"), [(16, True), (32, True), (48, False)])
def test_a_block_that_a_tile_holds_is_one_bulk_copy(block_size, whole, tmp_path):
    """Lanes issue their copies one after another: four for a run of a larger block."""
    from quatom.ops.attention.cuda import compile_decode, default_config

    config = default_config(128, 1, (9, 0))
    options = {"bf16": False, "softcap": False, "window": False, "sinks": False}
    cubin = compile_decode("sm_90", config, 128, block_size, 1, **options)
    sass = disassemble(cubin, tmp_path)
    record = block_size * 2 * (64 + 4)  # codes of K and V, and their pairs
    units = rf"UMOV UR\d+, 0x{record // 16:x} "  # a copy's size, in 16 bytes
    assert bool(re.search(units, sass)) == whole


NORMS = [Norm(eps=1e-6), Norm(kind="layer", eps=1e-5, bias=True)]


@pytest.mark.parametrize(
    ("operation", "norm", "keep", "summands"),
    [
        ("reorder", None, False, 0),
        ("gated", None, False, 0),
        *(("norm", norm, keep, 0) for norm in NORMS for keep in (False, True)),
        ("norm", NORMS[0], False, 8),
    ],
)
def test_results_of_the_kernel_before_are_read_after_the_wait_for_it(
    operation, norm, keep, summands, tmp_path
):
    """The compiler moves loads that it takes for constant (LDG.CONSTANT) across ACQBULK."""
    # Few channels of many tokens where a sum is kept beside, many of one token where none is.
    layout, tokens = GroupLayout(normal=3968, group_size=128, outliers=128), 1
    if keep or operation == "gated":
        layout, tokens = GroupLayout(normal=96, group_size=96, outliers=32), 4096
    spec = QuantizeSpec(layout=layout, byte_layout="groups")
    variant = choose_variant(operation, tokens, layout)
    constants = cuda_quantize.defines(
        operation, variant, spec, torch.bfloat16, norm, keep=keep, summands=summands
    )
    source = cuda_build.read_source("quatom.ops", "quantize.cu")
    sass = disassemble(compile_cubin(source, "sm_90a", constants), tmp_path)
    before, wait, after = sass.partition("ACQBULK")
    assert wait
    assert "LDG" in after
    assert not re.search(GLOBAL_WRITE, before)
    assert not re.search(r"LDG\S*CONSTANT", sass)
    # Before it parameters alone are read, and all of them: weight and bias of the norm, the order
    # of the first groups. Read later, they would queue after the weights of the next linear layer.
    parameters = 0 if norm is None else constants["VECTORS"] * (1 + norm.bias)
    orders = 0 if operation == "gated" else 2
    assert len(re.findall("LDG", before)) == parameters + orders
    assert not re.search(r"\b(LDL|STL)\b", sass)
