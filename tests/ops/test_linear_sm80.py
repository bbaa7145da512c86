"""The INT4 tensor-core kernel: native instructions where they exist, exact results."""

import pytest
import torch

from quatom.errors import BackendError, ShapeError
from quatom.numerics.groups import GroupLayout, expand_scales
from quatom.ops import cuda_build
from quatom.ops.activations import QuantizeSpec, pack_values
from quatom.ops.cuda_build import compile_cubin
from quatom.ops.linear.sm80 import linear_sm80, prepare_sm80, source_sm80


def random_codes(rows, layout, rng):
    normal = torch.randint(-8, 8, (rows, layout.normal), generator=rng)
    outliers = torch.randint(-128, 128, (rows, layout.outliers), generator=rng)
    return torch.cat((normal, outliers), dim=1).float()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_int4_instructions_are_native_before_hopper(arch, tmp_path, monkeypatch):
    from test_cuda_build import disassemble

    monkeypatch.setenv("QUATOM_CACHE_DIR", str(tmp_path))
    try:
        cuda_build._nvrtc()
    except BackendError as error:
        pytest.skip(f"no NVRTC here: {error}")
    sass = disassemble(compile_cubin(source_sm80(), arch), tmp_path)
    assert "IMMA.16864.S4.S4" in sass
    assert "IMMA.16832.S8.S8" in sass


def test_packing_keeps_every_code():
    from quatom.numerics.packing import unpack_bits

    layout = GroupLayout(128, 64, 32)
    values = random_codes(5, layout, torch.Generator().manual_seed(0))
    packed, outliers, _ = prepare_sm80(values, torch.ones(5, 3), layout)
    codes = unpack_bits(packed, 4).to(torch.int16)
    assert torch.equal(torch.where(codes > 7, codes - 16, codes).float(), values[:, :128])
    assert torch.equal(outliers.float(), values[:, 128:])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize(
    "layout", [GroupLayout(384, 128, 128), GroupLayout(192, 64), GroupLayout(320, 128, 64, 2)]
)
def test_results_are_exact_with_power_of_two_scales(tokens, layout, device):
    rng = torch.Generator().manual_seed(tokens)
    x, w = random_codes(tokens, layout, rng), random_codes(71, layout, rng)
    xs, ws = (
        2.0 ** torch.randint(-6, -2, (n, layout.num_scales), generator=rng).float()
        for n in (tokens, 71)
    )
    mixed = pack_values(x.to(device), xs.to(device), QuantizeSpec(layout=layout), torch.float16)
    weights = prepare_sm80(w.to(device), ws.to(device), layout)
    bias = torch.arange(71.0)
    got = linear_sm80(mixed, weights, bias.to(device)).cpu()
    real = [v.double() * expand_scales(s, layout).double() for v, s in ((x, xs), (w, ws))]
    assert torch.equal(got, (real[0] @ real[1].t() + bias).half())


def test_errors_name_the_numbers():
    with pytest.raises(ShapeError, match=r"group_size 96 and 192 normal channels"):
        prepare_sm80(torch.zeros(2, 192), torch.ones(2, 2), GroupLayout(192, 96))
    layout = GroupLayout(64, 64)
    weights = prepare_sm80(torch.zeros(2, 64), torch.ones(2, 1), layout)
    mixed = pack_values(
        torch.zeros(1, 64), torch.ones(1, 1), QuantizeSpec(layout=layout), torch.float16
    )
    with pytest.raises(BackendError, match=r"int4 in 'rows' on cpu"):
        linear_sm80(mixed, weights)
