"""What the compiler makes of the Hopper linear kernel, seen without a GPU."""

import json
import re

import pytest
import torch
from tests.ops.test_cuda_build import disassemble

from quatom.errors import BackendError
from quatom.ops import cuda_build
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.linear import configs
from quatom.ops.linear.configs import CONFIGS, TUNINGS, Config, choose_config, read_tuning
from quatom.ops.linear.cuda import count_clusters, defines, kernel_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    try:
        cuda_build._nvrtc()
    except BackendError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")


@pytest.mark.parametrize(
    "config",
    [
        # Few and many tokens, one to three warpgroups, either kind of matrix unit.
        Config(16, 1, split=2, ctas_per_sm=3),
        Config(128, 3, signed=True),
        Config(128, 2, blocks=2, parts=2, signed=True),
        Config(64, 1, split=2, ctas_per_sm=2, integer=True),
        Config(256, 2, parts=2, integer=True),
    ],
    ids=str,
)
def test_the_producer_copies_without_loops_and_the_steps_without_spills(config, tmp_path):
    source = kernel_source(config.columns)
    sass = disassemble(compile_cubin(source, "sm_90a", defines(config, torch.float16)), tmp_path)
    # A bulk copy takes its addresses from uniform registers. Where the compiler does not see that
    # one thread copies, it loops over all that might: such a producer once bounded large tiles.
    assert "UBLKCP" in sass
    assert "BRA.U.ANY" not in sass
    # Its loops stand together, behind the first copies of weights, and fetch no address from vector
    # registers: as long as they did, one scheduler converted weights at half its speed.
    copies = [match.start() for match in re.finditer("UBLKCP", sass)]
    weights = len([c for c in copies if c < sass.index("GMMA")])
    assert sass[copies[weights] : copies[-1]].count("R2UR") <= 4
    # Outliers are integers in either case.
    assert f"IGMMA.64x{config.columns}x32.S8.S8" in sass
    assert config.integer or f"QGMMA.64x{config.columns}x32.F32.E4M3.E4M3" in sass
    # What it loads otherwise, it never writes: bias and row scales. The rest comes by bulk copies.
    assert all("CONSTANT" in load for load in re.findall(r"LDG\S*", sass))
    # A few registers may be saved around the loop; inside it a spill would cost every step.
    kind = "IGMMA" if config.integer else "QGMMA"
    matrix = [match.start() for match in re.finditer(f"{kind}.64x{config.columns}x32", sass)]
    loop = sass[matrix[0] : matrix[-1]]
    assert "CALL" not in loop
    assert len(re.findall(r"\b(LDL|STL)\b", loop)) <= 4


@pytest.mark.parametrize(
    ("tiles", "config", "clusters"),
    [
        (172, Config(64, 1, ctas_per_sm=2), 172),
        (500, Config(64, 1, ctas_per_sm=2), 264),  # in turns
        (64, Config(64, 1, split=2), 66),  # 128 CTAs would leave four SMs idle
        (64, Config(64, 1, split=4), 66),
        (64, Config(64, 1, split=3), 64),  # 192: nothing near
        (66, Config(64, 1, split=2), 66),
        (3, Config(64, 1, split=2), 3),
    ],
)
def test_a_launch_leaves_no_few_sms_idle(tiles, config, clusters):
    assert count_clusters(tiles, config, sms=132) == clusters


@pytest.mark.parametrize("gpu", TUNINGS)
def test_the_tuned_choices_are_among_the_tested_configurations(gpu):
    table = json.loads(read_tuning(f"NVIDIA {gpu}"))
    assert gpu in table["environment"]["gpu"].split()
    chosen = {Config(**c["config"] | {"integer": c["integer"]}) for c in table["choices"]}
    assert chosen <= set(CONFIGS)


def test_a_gpu_without_a_table_is_named_once(caplog):
    caplog.set_level("INFO", logger="quatom")
    choose_config.cache_clear()
    configs._tuned.cache_clear()
    other = [choose_config(m, 64, 33, "NVIDIA GH200 480GB", integer=True) for m in (1, 64)]
    assert len(caplog.records) == 1
    assert "never tuned on NVIDIA GH200 480GB" in caplog.text
    assert "choices of an H100" in caplog.text
    assert "tune_linear" in caplog.text
    caplog.clear()
    known = [choose_config(m, 64, 33, "NVIDIA H100 80GB HBM3", integer=True) for m in (1, 64)]
    assert other == known
    assert not caplog.records
