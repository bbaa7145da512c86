"""Every public entry checks every argument at its door: one line, and nothing read or written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import isclass, signature
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

import quatom
from quatom.arguments import Range, Size, check, checked
from quatom.checkpoint.compressed_tensors import export_compressed_tensors
from quatom.engine.config import EngineConfig
from quatom.engine.llm import LLM
from quatom.engine.sampling import SamplingParams, StructuredOutput
from quatom.errors import ArgumentError, BackendError, EngineError, QuatomError, RequestError
from quatom.placement import usable_device
from quatom.quantize.importing import import_checkpoint
from quatom.search.run import search_recipe
from tests.families.models import save_tiny

NAN, HUGE, ANYTHING = float("nan"), 10**30, object()
WRONG = (
    *(ANYTHING, None, True, 5, 5.5, NAN, HUGE, torch.float32, torch.tensor(5)),
    *("", "a\0b", b"x", [ANYTHING], {}, {ANYTHING: ANYTHING}, (one for one in "a")),
)
"""What some argument of some function may not be. Most of them may be none of these."""


def by_name(rows: dict[tuple, str]) -> dict[str, tuple]:
    """Name -> the values that an argument or field of this name may have."""
    return {name: values for values, names in rows.items() for name in names.split()}


RIGHT = by_name(
    {
        (None,): "device backend config calibration reference on_start on_block on_window text "
        "data_dir cache params",
        (True,): "resume progress outliers",
        (None, 5): "max_num_seqs max_model_len kv_cache_memory max_windows limit",
        (5,): "sequence_length batch_tokens",
        (5, 5.5): "bits",
        (None, torch.float32): "dtype",
        ("a\0b",): "prompt prompts",
        (None, "", "a\0b"): "model_name",
    }
)
RESULTS = {"LoadedModel", "RequestOutput", "CompletionOutput", "QuantizeReport", "Perplexity"}
"""Public classes that users get and do not make."""


def wrong_of(name, right):
    allowed = [(type(value), repr(value)) for value in right.get(name, ())]
    return [value for value in WRONG if (type(value), repr(value)) not in allowed]


def refusal(error, function, **arguments) -> str:
    """What a function that is called so says: one line."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llm(tiny_llama_dir):
    return LLM(tiny_llama_dir, device="cpu")


@pytest.fixture
def entries(tiny_llama_dir, llm, tmp_path) -> dict[str, tuple[Callable, dict]]:
    """Every public function, and arguments that it takes."""
    tokens, loaded = torch.zeros(64, dtype=torch.int64), quatom.load(tiny_llama_dir, device="cpu")
    source, target = {"source": tiny_llama_dir}, {"target": tmp_path / "q"}
    return {
        "load": (quatom.load, source),
        "quantize_checkpoint": (quatom.quantize_checkpoint, source | target | {"recipe": "w8a8"}),
        "measure_perplexity": (
            quatom.measure_perplexity,
            {"loaded": loaded, "tokens": tokens, "sequence_length": 16},
        ),
        "evaluate_tasks": (quatom.evaluate_tasks, {"loaded": loaded, "tasks": ["piqa"]}),
        "LLM": (LLM, {"model": tiny_llama_dir}),
        "LLM.from_engine": (LLM.from_engine, {}),
        "LLM.generate": (llm.generate, {"prompts": "a"}),
        "LLM.stream": (llm.stream, {"prompt": "a"}),
        "LLM.chat": (llm.chat, {"messages": [{"role": "user", "content": "a"}]}),
        "LLM.encode": (llm.encode, {}),
        "LLM.encode_chat": (llm.encode_chat, {}),
        "import_checkpoint": (import_checkpoint, source | target),
        "export": (export_compressed_tensors, {"checkpoint": tiny_llama_dir} | target),
        "search_recipe": (search_recipe, source | {"bits": 5.0, "calibration": tokens.view(4, 16)}),
    }


def test_every_public_entry_is_one_of_these(entries):
    functions = {
        name for name in quatom.__all__ if callable(getattr(quatom, name)) and name not in RESULTS
    }
    methods = {f"LLM.{name}" for name in vars(LLM) if not name.startswith("_")} - {"LLM.recipe"}
    own = {"SamplingParams", "EngineConfig", "Recipe", "QuatomError"}  # below, and test_recipe.py
    assert functions | methods <= entries.keys() | own
    assert entries.keys() == set(NAMES)


NAMES = [
    *("load", "quantize_checkpoint", "measure_perplexity", "evaluate_tasks", "LLM"),
    *("LLM.from_engine", "LLM.generate", "LLM.stream", "LLM.chat", "LLM.encode", "LLM.encode_chat"),
    *("import_checkpoint", "export", "search_recipe"),
]


@pytest.mark.parametrize("entry", NAMES)
def test_an_argument_of_another_kind_is_one_line_and_nothing_happens(entry, entries, tmp_path):
    function, given = entries[entry]
    right = RIGHT | ({"prompt": ("", "a\0b")} if entry == "LLM.encode" else {})
    for name in signature(function).parameters:
        for value in wrong_of(name, right):
            refusal(QuatomError, function, **given | {name: value})
            assert not list(tmp_path.iterdir()), (name, value)


RIGHT_FIELDS = by_name(
    {
        (5,): "n min_tokens top_k max_num_seqs max_num_batched_tokens block_size",
        (None, 5): "max_tokens seed logprobs prompt_logprobs max_prefill_chunk max_model_len "
        "max_waiting kv_cache_memory prefill_graph_tokens",
        (5, 5.5): "temperature repetition_penalty",
        (True,): "include_stop_str_in_output ignore_eos detokenize skip_special_tokens "
        "forecast_admission prefix_caching cuda_graphs keep_freed_memory",
        (None, True): "overlap",
        ("a\0b",): "stop bad_words",
        (None,): "structured",
    }
) | {"logit_bias": ({},)}
CLASSES = {SamplingParams: RequestError, EngineConfig: EngineError}


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, field.name) for cls in CLASSES for field in fields(cls)]
)
def test_a_field_of_another_kind_is_refused_with_its_name(cls, name):
    for value in wrong_of(name, RIGHT_FIELDS):
        assert name in refusal(CLASSES[cls], cls, **{name: value})


PARAMETERS = [
    ({"ignore_eos": "no"}, "ignore_eos must be true or false, got 'no'"),
    ({"detokenize": 0}, "detokenize must be true or false, got 0"),
    ({"temperature": 10**400}, "temperature must be in [0, 100], got 1000"),
    ({"seed": 10**5000}, "seed must be from -9223372036854775808 to"),
    ({"max_tokens": 2**63}, "max_tokens must be from 0 to 9223372036854775807"),
    ({"stop": 5}, "stop must be a string or a list, got 5"),
    ({"stop": ["a", None]}, "stop[1] must be a string, got None"),
    ({"stop": "\ud800"}, "stop holds '\\ud800', half of a surrogate pair, at character 0"),
    ({"stop": {"a"}}, "stop must be a string or a list, got {'a'}"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
    ({"stop_token_ids": b"x"}, "stop_token_ids must be a list, got b'x'"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0] must be an integer, got True"),
    ({"bad_words": {"a": 1}}, "bad_words must be a string or a list, got {'a': 1}"),
    ({"bad_words": ["a\ud800"]}, "bad_words[0] holds '\\ud800', half of a surrogate pair"),
    ({"logit_bias": [(1, 2.0)]}, "logit_bias must be a dict, got [(1, 2.0)]"),
    ({"logit_bias": {"1": 2.0}}, "a key of logit_bias must be an integer, got '1'"),
    ({"logit_bias": {1: NAN}}, "logit_bias[1] must be in [-100, 100], got nan"),
    ({"logit_bias": {1: "x"}}, "logit_bias[1] must be a number, got 'x'"),
    ({"shown_token_ids": "ab"}, "shown_token_ids must be a list, got 'ab'"),
    ({"shown_token_ids": [-1]}, "shown_token_ids[0] must be at least 0, got -1"),
    ({"structured": {"json": 1}}, "structured must be a StructuredOutput, got {'json': 1}"),
]


@pytest.mark.parametrize(("options", "message"), PARAMETERS, ids=range(len(PARAMETERS)))
def test_parameters_are_refused_with_their_values(options, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("made", [("regexp", "a"), (5, "a"), ("regex", 5), ("regex", "\ud800")])
def test_a_constraint_of_another_kind_is_refused(made):
    with pytest.raises(RequestError, match=r"structured\.(kind|value) "):
        StructuredOutput(*made)


def test_what_is_kept_is_plain_and_cannot_be_changed():
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        stop="end",
        stop_token_ids=range(3),
        logit_bias={np.int64(5): np.float32(1)},
    )
    kept = (params.n, params.temperature, params.stop, params.stop_token_ids)
    assert kept == (2, 0.5, ("end",), (0, 1, 2))
    assert [type(value) for value in kept] == [int, float, tuple, tuple]
    assert [(type(k), type(v)) for k, v in params.logit_bias.items()] == [(int, float)]
    with pytest.raises(TypeError):
        params.logit_bias[6] = 1.0


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "shown_token_ids"])
def test_a_token_that_the_model_does_not_have_is_refused(name, llm):
    ids = {320: 1.0} if name == "logit_bias" else [320]
    with pytest.raises(RequestError, match=f"{name} holds token id 320; the model has 320 tokens"):
        llm.generate("a", SamplingParams(**{name: ids}))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("a", 5, "params must be a SamplingParams or a list, got 5"),
        (
            "a",
            {"max_tokens": 3},
            "params must be a SamplingParams or a list, got {'max_tokens': 3}",
        ),
        ("a", SamplingParams, "params must be a SamplingParams or a list, got <class"),
        ("a", [None], "params[0] must be a SamplingParams, got None"),
        ("a", [], "1 prompts but 0 SamplingParams"),
        (["a", "b"], [SamplingParams()], "2 prompts but 1 SamplingParams"),
        ([True, False], None, "a prompt is a text or a list of token ids, got [True, False]"),
        (torch.tensor([True]), None, "a prompt is a text or a list of token ids, got tensor"),
        ((one for one in "ab"), None, "a prompt is a text or a list of token ids, got <generator"),
        ([[HUGE]], None, f"the prompt holds token id {HUGE}; the model has 320 tokens"),
        ([[-1]], None, "the prompt holds token id -1; the model has 320 tokens"),
    ],
)
def test_prompts_and_parameters_that_do_not_fit_are_named(prompts, params, message, llm):
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, params)
    assert str(caught.value).startswith(message)
    assert not llm.engine.has_work


@pytest.mark.parametrize("content", [None, 5, b"a", ["a"], [5]])
def test_a_message_without_a_text_is_refused(content, llm):
    with pytest.raises(QuatomError, match=r"messages\[1\] must have a content"):
        llm.chat([{"role": "user", "content": "a"}, {"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"kv_cache_memory": HUGE}, "kv_cache_memory must be from 1 to 9223372036854775807"),
        ({"kv_cache_memory": 2**60}, "kv_cache_memory 1,152,921,504,606,846,976 is more than the"),
        ({"max_num_seqs": 65_537}, "max_num_seqs must be from 1 to 65536, got 65537"),
        ({"config": {}}, "config must be an EngineConfig, got {}"),
    ],
    ids=str,
)
def test_limits_are_refused_before_the_model_is_read(limits, message, monkeypatch):
    monkeypatch.setattr("quatom.engine.llm.load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(EngineError) as caught:
        LLM("none", device="cpu", **limits)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("device", [HUGE, 0, True, "cpu:99", torch.device("cpu", 1), "cpu:-1", ""])
def test_devices_that_are_not_there(device):
    with pytest.raises(BackendError, match=r"use cpu"):
        usable_device(device)
    assert usable_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "target must name a file or folder, got ''"),
        ("a\0b", "target must name a file or folder, got 'a\\\\x00b'"),
        ("\ud800", "target must name a file or folder, got '\\\\ud800'"),
        ("file", "file exists; choose another target or delete it"),
        ("folder", "folder exists; choose another target or delete it"),
        ("file/q", "cannot write"),
    ],
)
@pytest.mark.parametrize("entry", ["quantize_checkpoint", "export"])
def test_targets_that_cannot_be_written(entry, target, message, entries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    function, given = entries[entry]
    if entry == "export":
        quatom.quantize_checkpoint(given["checkpoint"], tmp_path / "w", "w8a8")
        given = given | {"checkpoint": tmp_path / "w"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QuatomError, match=message):
        function(**given | {"target": target})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_whose_heads_no_cache_holds_is_not_loaded(tmp_path):
    folder = save_tiny(tmp_path / "m", "qwen3", head_dim=32)
    with pytest.raises(QuatomError, match="head_dim 32 is not supported; the paged cache has 64"):
        quatom.load(folder)


TOKENS = {
    "of two rows": torch.zeros(2, 64, dtype=torch.int64),
    "of no integers": torch.zeros(128),
    "of truth values": torch.zeros(128, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_that_are_no_text_are_not_scored(kind, entries):
    function, given = entries["measure_perplexity"]
    with pytest.raises(QuatomError, match=r"tokens must be \(tokens,\) integers, got \("):
        function(**given | {"tokens": TOKENS[kind]})
    narrow = given["tokens"].to(torch.int32)
    assert function(**given | {"tokens": narrow}).perplexity == function(**given).perplexity


WORDS = [
    (Literal["a", "b"], "c", "it must be one of a, b, got 'c'"),
    (Literal["a", "b"] | None, 5, "it must be one of a, b, got 5"),
    (str | Path, 5, "it must be a path, got 5"),
    (Callable[[int], None] | None, 5, "it must be a function, got 5"),
    (int | str, 5.5, "it must be an integer or a string, got 5.5"),
    (float, NAN, "it must be a finite number, got nan"),
    (Annotated[int, Range(2)], 1, "it must be at least 2, got 1"),
    (Annotated[int, Range(2, 4)], 5, "it must be from 2 to 4, got 5"),
    (Annotated[float, Range(0, 1, open_low=True)], 0, "it must be in (0, 1], got 0"),
    (Annotated[float, Range(0)], -1, "it must be in [0, inf), got -1"),
    (Annotated[str, Size(2, 3)], "a", "it must have 2 to 3 characters, got 1"),
    (Annotated[Sequence[int], Size(0, 1)], (1, 2), "it must have at most 1 items, got 2"),
    (Annotated[Sequence[int], Size(1)], [], "it must have at least 1 items, got 0"),
    (Mapping[str, bool], {"a": 1}, "it['a'] must be true or false, got 1"),
    (tuple[int, ...], [1, "b"], "it[1] must be an integer, got 'b'"),
    (EngineConfig, torch.zeros(3, 3), "it must be an EngineConfig, got tensor([[0., 0., 0.], "),
]


@pytest.mark.parametrize(("hint", "value", "message"), WORDS, ids=str)
def test_what_is_wrong_is_said_on_one_line(hint, value, message):
    with pytest.raises(ArgumentError) as caught:
        check("it", value, hint, ArgumentError)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_checked_function_is_called_with_what_was_kept():
    @checked(but=("free",))
    def call(number: float, *, free: int = 0, names: Sequence[str] = ()) -> tuple:
        return number, free, names

    assert call(np.int64(5), free="x", names=["a"]) == (5.0, "x", ("a",))
    assert isclass(type(call(5)[0]))
    with pytest.raises(ArgumentError, match="number must be a number, got 'x'"):
        call("x")
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        call(5, other=1)
