"""A mixture of experts from a folder to answers of the server."""

from dataclasses import replace
from functools import partial

import httpx
import pytest

from quatom.engine.config import EngineConfig
from quatom.engine.engine import Engine
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams
from quatom.loading import load
from quatom.presets import PRESETS
from quatom.quantize.pipeline import quantize_checkpoint
from quatom.recipe import CalibrationSpec
from tests.families.models import save_mxfp4, save_tiny
from tests.serving.conftest import running_server

CONFIG = EngineConfig(max_num_seqs=4, max_model_len=128, block_size=16)


@pytest.mark.parametrize("make", [partial(save_tiny, name="mixtral"), save_mxfp4])
def test_a_mixture_is_served(make, tmp_path, text_file):
    calibration = CalibrationSpec(num_samples=2, sequence_length=48)
    recipe = replace(PRESETS["quatom-w4a8kv4"], calibration=calibration)
    source = tmp_path / "m"
    make(source)
    quantize_checkpoint(source, tmp_path / "q", recipe, calibration=text_file)
    prompt = [1, 2, 3, 4, 5]
    engine = Engine(load(tmp_path / "q"), CONFIG)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (want,) = LLM.from_engine(engine).generate([prompt], params)
    with running_server(Engine(load(tmp_path / "q"), CONFIG)) as server:
        body = {
            "model": "hash",
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        answers = [
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            for _ in range(2)  # the second from the prefix cache
        ]
    for answer in answers:
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["text"] == want.outputs[0].text
