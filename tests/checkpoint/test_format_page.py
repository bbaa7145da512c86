"""The page on the checkpoint format: its code reads one, its numbers are the schema's."""

import re
from pathlib import Path

import torch

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.schema import bits_per_weight, linear_tensors
from quatom.families.registry import read_config
from quatom.numerics.formats import get_format
from quatom.numerics.groups import dequantize_groups
from quatom.numerics.packing import unpack_bits
from quatom.plan import plan
from quatom.presets import PRESETS
from tests.checkpoint.models import CONFIG, SMOLLM2, write_model
from tests.checkpoint.test_writer import write

FILE = Path(__file__).parents[2] / "docs" / "reference" / "checkpoint-format.md"
PAGE = FILE.read_text(encoding="utf-8")
ATOM = PRESETS["atom-w4a4kv4"]


def test_the_code_of_the_page_dequantizes_a_linear(tmp_path, monkeypatch):
    config = CONFIG | {"hidden_size": 384, "num_attention_heads": 6}  # 352 = 2 groups + 96
    write(tmp_path / "smollm2-atom", open_source(write_model(tmp_path / "source", config)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)

    source = open_source(tmp_path / "smollm2-atom")
    p = "model.layers.0.self_attn.q_proj"
    codes = get_format("int4").decode(unpack_bits(source.load(f"{p}.weight_packed"), 4))
    values = torch.cat((codes, source.load(f"{p}.outlier_weight").float()), dim=1)
    scales = source.load(f"{p}.weight_scale").repeat_interleave(2, dim=0)
    scales = torch.cat((scales, source.load(f"{p}.outlier_scale")), dim=1)
    layout = plan(source.model_config, ATOM).layers[0].sites["qkv"].layout
    assert layout.group_sizes == (128, 128, 96, 32)
    stored = dequantize_groups(values, scales, layout)
    order = source.load(f"{p}.order").long()
    assert torch.equal(names["weight"][:, order], stored)


def test_the_sizes_of_the_page():
    resolved = plan(read_config(SMOLLM2), ATOM)
    block = 0
    sites = resolved.layers[0].sites.values()
    for site, linear in ((s, linear) for s in sites for linear in s.linears):
        tensors = linear_tensors(site, linear)
        sizes = [spec.bits(torch.float16) // 8 for spec in tensors.values()]
        block += sum(sizes)
        kind = linear.kind
        row = next(x for x in PAGE.splitlines() if x[0:1] == "|" and kind in x[:24])
        assert [int(n) for n in re.findall(r"\| (\d+) (?=\|)", row)] == sizes
    assert f"{block:,} bytes" in PAGE
    assert f"{bits_per_weight(resolved):.3f} bits per weight" in PAGE
