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

    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__
    ]
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


@pytest.fixture(scope="module")
def llm(tiny_llama_dir):
    return quatom.LLM(tiny_llama_dir, device="cpu")


GREEDY = quatom.SamplingParams(max_tokens=12, temperature=0.0)


def test_a_stream_is_the_text_piece_by_piece(llm):
    whole = llm.generate("Once upon", GREEDY)[0]
    pieces = list(llm.stream("Once upon", GREEDY))
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == whole.text
    assert "".join(llm.stream(whole.prompt_token_ids, GREEDY)) == whole.text


def test_a_stream_that_is_left_frees_the_engine(llm):
    stream = llm.stream("Once upon", GREEDY)
    next(stream)
    with pytest.raises(quatom.QuatomError, match="another stream of this LLM is open"):
        llm.stream("Another", GREEDY)
    stream.close()
    assert not llm.engine.has_work
    assert next(llm.stream("Once upon", GREEDY))
    whole = llm.generate("Once upon", GREEDY)[0]
    assert "".join(llm.stream("Once upon", GREEDY)) == whole.text


def test_what_cannot_be_streamed_is_refused_at_once(llm):
    with pytest.raises(quatom.QuatomError, match="one completion, got n 2"):
        llm.stream("a", quatom.SamplingParams(n=2))
    for call in (llm.stream, llm.generate):
        with pytest.raises(quatom.QuatomError, match=r"holds '\\ud83d', half .* at character 2"):
            call("ab\ud83d", GREEDY)
    with pytest.raises(quatom.QuatomError, match=r"half of a surrogate pair"):
        llm.chat([{"role": "user", "content": "\udc00"}], GREEDY)


def test_the_bar_of_generate_is_on_stderr(llm, capsys):
    llm.generate(["a", "b"], GREEDY, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "generating" in err
