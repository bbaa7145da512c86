"""Whatever is wrong with the input: one line that names it, exit status 1, and nothing lost."""

import json
import os
import shutil
import sys

import pytest
import torch

from tests.checkpoint.models import replace_tensors
from tests.cli.commands import SMALL

GATE = "model.layers.1.mlp.gate_proj.weight"
SHORT = ("--num-samples", 2, "--sequence-length", 24)


@pytest.fixture
def broken(small_dir, tmp_path):
    """A copy of the small model to break."""
    return shutil.copytree(small_dir, tmp_path / "model")


def tree(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None
        for f in folder.rglob("*")
    }


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(SMALL | changes))


def change_tensor(folder, tensor, name=GATE):
    replace_tensors(folder / "model.safetensors", **{name.replace(".", "__"): tensor})


def truncate(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def holding(value):
    tensor = torch.zeros(SMALL["intermediate_size"], SMALL["hidden_size"])
    tensor[3, 4] = value
    return tensor


SOURCES = {
    "unknown architecture": (
        lambda f: change_config(f, architectures=["OtherForCausalLM"], model_type="other"),
        ["OtherForCausalLM", "LlamaForCausalLM"],
    ),
    "an architecture that is known not to run": (
        lambda f: change_config(f, architectures=["MambaForCausalLM"], model_type="mamba"),
        ["MambaForCausalLM", "state-space layers", "families.md"],
    ),
    "a key that changes the mathematics": (
        lambda f: change_config(f, final_logit_softcapping=30.0),
        ["final_logit_softcapping", "30.0"],
    ),
    "an unknown key": (lambda f: change_config(f, mixer="conv"), ["mixer", "'conv'"]),
    "truncated safetensors": (truncate, ["model.safetensors", "truncated", "download it again"]),
    "a missing tensor": (lambda f: change_tensor(f, None), ["lacks", GATE, "1 of"]),
    "NaN": (
        lambda f: change_tensor(f, holding(torch.nan)),
        ["model.safetensors", GATE, "1 NaN or infinite", str(160 * 128)],
    ),
    "infinity": (lambda f: change_tensor(f, holding(-torch.inf)), [GATE, "1 NaN or infinite"]),
    "a wrong shape": (
        lambda f: change_tensor(f, torch.zeros(100, 128)),
        [GATE, "(100, 128)", "(160, 128)"],
    ),
    "an integer weight": (
        lambda f: change_tensor(f, torch.zeros(160, 128, dtype=torch.int32)),
        [GATE, "int32", "float32"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights", "safetensors"]),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a config.json that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json", "no valid JSON"],
    ),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        ["tokenizer.json"],
    ),
    "a head that is too small to share": (
        lambda f: change_config(f, num_key_value_heads=3, num_attention_heads=2),
        ["2", "3"],
    ),
    "another quantizer's model": (
        lambda f: change_config(f, quantization_config={"quant_method": "awq"}),
        ["awq"],
    ),
}


@pytest.mark.parametrize("fault", SOURCES)
def test_a_bad_source_is_refused(fault, broken, text_file, shell, tmp_path):
    breaks, words = SOURCES[fault]
    breaks(broken)
    before = tree(broken)
    target = tmp_path / "out" / "q"
    target.parent.mkdir()
    error = shell.fails("quantize", broken, target, "--calibration", text_file, *SHORT)
    for word in words:
        assert word in error, error
    assert tree(broken) == before
    assert not target.exists()


@pytest.mark.parametrize("fault", [f for f in SOURCES if f != "no tokenizer"])
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_other_commands_refuse_it_too(fault, command, broken, text_file, shell):
    breaks, words = SOURCES[fault]
    breaks(broken)
    options = {"eval": ("--perplexity", text_file), "generate": ("--prompt", "a")}[command]
    error = shell.fails(command, broken, *options)
    for word in words:
        assert word in error, error


def recipe_file(folder, **data):
    path = folder / "recipe.json"
    path.write_text(json.dumps(data))
    return path


ARGUMENTS = {
    "a text shorter than a sequence": (
        lambda d: ("--calibration", text(d, b"few words"), "--sequence-length", 50),
        ["text.txt has 9 tokens", "50", "--sequence-length"],
    ),
    "no such text": (lambda d: ("--calibration", d / "absent.txt"), ["absent.txt", "no such"]),
    "a folder as text": (lambda d: ("--calibration", d), ["is a folder"]),
    "text that is not UTF-8": (
        lambda d: ("--calibration", text(d, b"abc\xff\xfe")),
        ["text.txt", "not UTF-8", "byte 3"],
    ),
    "rows of JSON": (
        lambda d: ("--calibration", text(d, b'[{"text": "a"}]', "rows.json")),
        ["rows.json is no plain text", ".jsonl"],
    ),
    "a binary file": (
        lambda d: ("--calibration", text(d, b"ab\0cd" * 100)),
        ["text.txt is no text", "control character 0"],
    ),
    "too little text for samples that differ": (
        lambda d: ("--calibration", text(d, b"a" * 24), "--num-samples", 4),
        ["24 tokens", "only 1 of 4", "--num-samples"],
    ),
    "a token that the model does not have": (
        lambda d: ("--calibration", text(d, "é</s>[PAD]".encode() * 50)),
        ["token id 260", "260 tokens, 0 to 259"],
    ),
    "a data set without the network": (
        lambda d: ("--calibration", "no/data:config"),
        ["no/data is no file", ".jsonl"],
    ),
    "no text at all": (lambda d: (), ["quatom-w4a8kv4", "--calibration"]),
    "sequences longer than the model's context": (
        lambda d: ("--calibration", text(d, b"a" * 5000), "--sequence-length", 4096),
        ["4096", "128"],
    ),
    "an unknown recipe": (
        lambda d: ("--recipe", "atom-w1a1"),
        ["'atom-w1a1'", "did you mean 'atom-w", ".json"],
    ),
    "a recipe that quantizes nothing": (lambda d: ("--recipe", "fp16"), ["'fp16'"]),
    "a recipe file that is not there": (
        lambda d: ("--recipe", d / "absent.json"),
        ["absent.json", "No such file"],
    ),
    "a recipe file that is no JSON": (
        lambda d: ("--recipe", text(d, b"{", "r.json")),
        ["r.json is not a recipe"],
    ),
    "a recipe file that is nested too deeply": (
        lambda d: ("--recipe", text(d, b"[" * 100_000, "r.json")),
        ["r.json is not a recipe", "nested too deeply"],
    ),
    "a recipe file that gives a field twice": (
        lambda d: ("--recipe", text(d, b'{"base": "w8a8", "base": "w4a16"}', "r.json")),
        ["r.json is not a recipe", "the key 'base' has two values"],
    ),
    "a recipe whose name is no text": (
        lambda d: ("--recipe", text(d, b'{"base": "w8a8", "name": "a\\ud800"}', "r.json")),
        ["r.json is not a recipe", "half of a surrogate pair"],
    ),
    "a result file that is none": (
        lambda d: ("--json", text(d, b"mine", "out.json"), "--recipe", "w8a8"),
        ["out.json exists and is no result file"],
    ),
    "a result file that is a folder": (
        lambda d: ("--json", d, "--recipe", "w8a8"),
        ["Is a directory; give another --json"],
    ),
    "a recipe file that is no object": (
        lambda d: ("--recipe", text(d, b"[1]", "r.json")),
        ["r.json", "[1]"],
    ),
    "a recipe with a misspelt word": (
        lambda d: ("--recipe", recipe_file(d, weights={"rounder": {"method": "gtpq"}})),
        ["weights.rounder.method", "'gtpq'", "gptq, nearest"],
    ),
    "a recipe that does not fit the sizes": (
        lambda d: ("--recipe", recipe_file(d, tensor_parallel=3)),
        ["o_proj", "128", "tensor_parallel 3"],
    ),
    "no samples": (lambda d: ("--num-samples", 0), ["0 of 24"]),
    "cuda without a GPU": (lambda d: ("--device", "cuda"), ["cuda", "no GPU", "cpu"]),
    "an unknown device": (lambda d: ("--device", "tpu"), ["tpu", "cpu or cuda"]),
    "an unknown dtype": (lambda d: ("--dtype", "int8"), ["'int8'", "bfloat16"]),
}


def text(folder, content, name="text.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("fault", ARGUMENTS)
def test_bad_arguments_of_quantize_are_refused_and_nothing_is_written(
    fault, padded_dir, shell, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    make, words = ARGUMENTS[fault]
    # Later options win: SHORT holds where a row gives none.
    arguments = (*SHORT, *make(tmp_path))
    before = tree(tmp_path)
    error = shell.fails("quantize", padded_dir, tmp_path / "q", *arguments)
    for word in words:
        assert word in error, error
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def padded_dir(small_dir, tmp_path_factory):
    """The small model of 260 tokens with a tokenizer of 261, as some fine-tunes are."""
    folder = shutil.copytree(small_dir, tmp_path_factory.mktemp("models") / "padded")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = {str(258 + i): {"content": text} for i, text in enumerate(["[A]", "[B]", "[PAD]"])}
    settings |= {"added_tokens_decoder": listed}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_token_beyond_the_vocabulary_is_one_line_in_every_command(padded_dir, shell, tmp_path):
    words = text(tmp_path, b"a[PAD]" * 50)
    eval_error = shell.fails("eval", padded_dir, "--perplexity", words, "--sequence-length", 50)
    generate_error = shell.fails("generate", padded_dir, "--prompt", "a[PAD]")
    inspect_error = shell.fails("inspect", padded_dir, "--text", words)
    for error in (eval_error, generate_error):
        assert "token id 260" in error
        assert "260 tokens, 0 to 259" in error
    assert "fewer than" in inspect_error or "token id 260" in inspect_error


@pytest.mark.parametrize("target", [".", "/", "..", "sub/.."])
def test_a_target_that_is_a_folder_by_nature_is_refused(target, small_dir, text_file, shell):
    error = shell.fails("quantize", small_dir, target, "--calibration", text_file, *SHORT)
    assert f"{target} is an existing folder" in error


HUGE = {  # (change of a tensor, words of the error)
    "eval": ("loss of window 1 of", "block 1 gives"),
    "quantize": ("block 1 gives",),
}


@pytest.mark.parametrize("command", HUGE)
def test_values_that_overflow_are_named_with_their_block(
    command, broken, text_file, shell, tmp_path
):
    """Two finite factors, whose product no float32 holds, in block 1."""
    for name in ("up_proj", "gate_proj"):
        tensor = torch.full((160, 128), 1e30)
        change_tensor(broken, tensor, f"model.layers.1.mlp.{name}.weight")
    arguments = {
        "eval": ("--perplexity", text_file, "--sequence-length", 50, "--max-windows", 2),
        "quantize": (tmp_path / "q", "--calibration", text_file, *SHORT),
    }[command]
    out = ("--json", tmp_path / "out.json")
    error = shell.fails(command, broken, *arguments, *out)
    for word in HUGE[command]:
        assert word in error, error
    assert "nan" in error or "inf" in error
    assert not (tmp_path / "out.json").exists()
    assert not (tmp_path / "q").exists()


def test_a_loss_whose_exponential_overflows_is_an_error(broken, text_file, shell):
    change_tensor(broken, torch.randn(260, 128) * 1e6, "lm_head.weight")
    options = ("--sequence-length", 50, "--max-windows", 2)
    error = shell.fails("eval", broken, "--perplexity", text_file, *options)
    assert "the mean loss is" in error
    assert "whose exponential no number holds" in error


def test_a_target_that_exists_is_kept(small_dir, text_file, shell, tmp_path):
    text(tmp_path, b"mine", "q")
    error = shell.fails("quantize", small_dir, tmp_path / "q", "--calibration", text_file, *SHORT)
    assert "q exists" in error
    assert tree(tmp_path) == {"q": b"mine"}


def test_a_source_that_is_quantized_already_is_refused(
    small_checkpoint, text_file, shell, tmp_path
):
    error = shell.fails(
        "quantize", small_checkpoint, tmp_path / "q", "--calibration", text_file, *SHORT
    )
    assert "already quantized (atom-w4a4kv4)" in error
    assert tree(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(small_dir, text_file, shell, tmp_path):
    tmp_path.chmod(0o500)
    error = shell.fails("quantize", small_dir, tmp_path / "q", "--calibration", text_file, *SHORT)
    assert str(tmp_path) in error


def test_a_parent_that_is_a_file_is_named(small_dir, text_file, shell, tmp_path):
    parent = text(tmp_path, b"mine", "file")
    error = shell.fails("quantize", small_dir, parent / "q", "--calibration", text_file, *SHORT)
    assert str(parent) in error
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "/absent", "--perplexity", __file__), ["/absent does not exist"]),
        (("inspect", "/absent"), ["/absent does not exist"]),
        (("generate", "/absent", "--prompt", "x"), ["/absent does not exist"]),
    ],
)
def test_a_model_that_is_not_there_is_named(arguments, words, shell):
    error = shell.fails(*arguments)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: ("--perplexity", d / "absent.txt"), ["absent.txt"]),
        (
            lambda d: ("--perplexity", text(d, b"few words"), "--sequence-length", 50),
            ["9 tokens", "50"],
        ),
        (
            lambda d: ("--perplexity", text(d, b"a" * 5000)),
            ["2048", "128"],
        ),
        (lambda d: ("--perplexity", text(d, b"a" * 500), "--sequence-length", 1), ["1", "128"]),
        (
            lambda d: (
                *("--perplexity", text(d, b"a" * 500), "--sequence-length", 50),
                *("--json", text(d, b"{}", "out.json")),
            ),
            ["out.json", "no result file"],
        ),
        (
            lambda d: (
                *("--perplexity", text(d, b"a" * 500), "--sequence-length", 50),
                *("--json", text(d, b"", "file") / "out.json"),
            ),
            ["out.json"],
        ),
    ],
)
def test_bad_arguments_of_eval_are_refused(make, words, small_dir, shell, tmp_path):
    arguments = make(tmp_path)
    before = tree(tmp_path)
    error = shell.fails("eval", small_dir, *arguments)
    for word in words:
        assert word in error, error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("layer", [2, 99, -1])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_that_is_not_there_is_refused(layer, quantized, small_dir, small_checkpoint, shell):
    folder = small_checkpoint if quantized else small_dir
    assert f"layer {layer} does not exist: the model has 0 to 1" in shell.fails(
        "inspect", folder, "--layer", layer
    )


def test_files_to_write_that_cannot_be_are_named(small_checkpoint, small_dir, shell, tmp_path):
    out = text(tmp_path, b"mine", "file") / "out"
    assert str(out) in shell.fails("inspect", small_checkpoint, "--json", out)
    assert str(out) in shell.fails("inspect", small_dir, "--plot", out.with_suffix(".png"))
    assert tree(tmp_path) == {"file": b"mine"}


def test_usage_errors_have_status_2(shell, small_dir, small_checkpoint, tmp_path):
    assert shell("quantize", small_dir).status == 2
    assert shell("eval", small_dir).status == 2
    assert shell("eval", small_dir, "--tasks", "piqa", "--reference", small_dir).status == 2
    assert shell("inspect", small_checkpoint, "--plot", tmp_path / "p.png").status == 2
    assert shell("nonsense").status == 2
    assert tree(tmp_path) == {}


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(small_dir, shell):
    error = shell.fails("generate", small_dir, "--prompt", "a" * 500)
    assert "500" in error
    assert "128" in error


def test_chat_without_a_template_is_refused(broken, shell):
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    error = shell.fails("generate", broken, "--prompt", "a", "--chat")
    assert "no chat template" in error


TEMPLATES = {
    "an exception of its own": ("{{ raise_exception('roles must alternate') }}", "roles must alt"),
    "a syntax error": ("{% for m in %}", "TemplateSyntaxError"),
    "an undefined attribute": ("{{ messages[0].parts.text.x }}", "UndefinedError"),
    "an attribute of nothing": ("{{ nothing.text }}", "'nothing' is undefined"),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a list without default": (
        [{"name": "rag", "template": "a"}, {"name": "tools", "template": "b"}],
        "chat template fails",
    ),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(fault, broken, shell):
    template, words = TEMPLATES[fault]
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    error = shell.fails("generate", broken, "--prompt", "a", "--chat")
    assert words in error
    assert "or give plain text" in error


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.zeros(128, dtype=torch.int32), "model.layers.0.self_attn.o_proj.order"),
        (torch.arange(128).int() + 1, "model.layers.0.self_attn.o_proj.order"),
        (torch.arange(128).int(), "model.layers.1.self_attn.k_proj.order"),
    ],
)
def test_a_checkpoint_with_a_damaged_order_is_refused(
    tensor, name, small_checkpoint, shell, tmp_path
):
    folder = shutil.copytree(small_checkpoint, tmp_path / "q")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    replace_tensors(folder / index["weight_map"][name], **{name.replace(".", "__"): tensor})
    error = shell.fails("generate", folder, "--prompt", "a")
    assert "order" in error
    assert "quantize again" in error


def test_a_layer_gptq_cannot_invert_stops_unless_nearest_is_allowed(
    small_dir, shell, tmp_path, monkeypatch
):
    """A damping below float64's precision leaves 24 tokens a singular matrix of 128 channels."""
    words = text(tmp_path, b"one and two and three " * 20)
    recipe = {"outliers": {"channels": 0}}
    arguments = ("--calibration", words, "--num-samples", 1, "--sequence-length", 24)
    singular = {"damping": 1e-25}
    path = recipe_file(tmp_path, **recipe, weights={"rounder": singular})
    error = shell.fails("quantize", small_dir, tmp_path / "q", "--recipe", path, *arguments)
    for word in ("model.layers.0 qkv", "128 x 128", "damping", "on_singular 'nearest'"):
        assert word in error, error
    assert not list(tmp_path.glob("q*"))
    path = recipe_file(
        tmp_path, **recipe, weights={"rounder": singular | {"on_singular": "nearest"}}
    )
    assert shell("quantize", small_dir, tmp_path / "q", "--recipe", path, *arguments).status == 0
