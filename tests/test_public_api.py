"""The names users write: they exist, are documented, and come without torch until used."""

import subprocess
import sys
from dataclasses import replace

import pytest

import quatom


def test_the_promised_names_are_there():
    promised = {"LLM", "SamplingParams", "Recipe", "PRESETS", "quantize_checkpoint", "load"}
    assert promised <= set(quatom.__all__) == set(dir(quatom))
    for name in quatom.__all__:
        assert getattr(quatom, name) is not None
    assert quatom.quantize_checkpoint.__doc__
    assert quatom.LLM.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'quatom' has no attribute 'nonsense'"):
        quatom.nonsense  # noqa: B018


def test_importing_it_does_not_import_torch():
    code = (
        "import sys, quatom; quatom.Recipe; quatom.PRESETS; assert 'torch' not in sys.modules;"
        "from quatom import LLM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_builtin_exceptions_too():
    from quatom import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert len(classes) > 5
    for error in classes:
        assert issubclass(error, errors.QuatomError)
        if error is not errors.QuatomError:
            assert issubclass(error, ValueError | RuntimeError)


def test_quantize_then_generate(tiny_llama_dir, text_file, tmp_path):
    """The way the README goes, on a tiny model."""
    spec = quatom.PRESETS["atom-w4a4kv4"].calibration
    recipe = replace(
        quatom.PRESETS["atom-w4a4kv4"],
        calibration=replace(spec, num_samples=2, sequence_length=24),
    )
    report = quatom.quantize_checkpoint(
        tiny_llama_dir, tmp_path / "q", recipe, calibration=text_file
    )
    assert report.target == tmp_path / "q"
    assert report.checkpoint_bytes == sum(
        f.stat().st_size for f in report.target.glob("*.safetensors")
    )
    llm = quatom.LLM(str(tmp_path / "q"))
    params = quatom.SamplingParams(max_tokens=5, temperature=0.0)
    texts = llm.generate(["Hello", "Once upon"], params)
    assert all(0 < len(result.token_ids) <= 5 for result in texts)
    assert all(isinstance(result.text, str) for result in texts)
    ids = llm.generate([llm.encode("Hello"), llm.encode("Once upon")], params)
    assert [result.token_ids for result in ids] == [result.token_ids for result in texts]
