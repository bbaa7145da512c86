"""`quatom doctor`: what it says is what the readers did."""

import json
import shutil

import pytest
import torch

from tests.checkpoint.gguf_models import write_gguf
from tests.checkpoint.models import replace_tensors, write_model


@pytest.fixture
def ask(shell, tmp_path):
    """Findings by place, and what the terminal shows."""

    def run(model):
        done = shell("doctor", model, "--json", tmp_path / "out.json")
        assert done.status == 0, done
        found = json.loads((tmp_path / "out.json").read_text())
        return {f["place"]: (f["believed"], f["passed_over"]) for f in found}, done.out

    return run


@pytest.fixture
def folder(small_dir, tmp_path):
    return shutil.copytree(small_dir, tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_a_folder(ask, folder):
    edit(folder / "config.json", torch_dtype="float32", use_cache=True, sliding_window=None)
    edit(folder / "generation_config.json", eos_token_id=[2], temperature=0.7)
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    (folder / "vocab.json").write_text("{}")
    replace_tensors(
        folder / "model.safetensors",
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16),
    )
    found, shown = ask(folder)
    believed, passed = found["config.json"]
    assert "hidden_size" in believed
    assert set(passed.split(", ")) == {"torch_dtype", "use_cache", "sliding_window"}
    assert found["generation_config.json"] == ("eos_token_id", "temperature")
    assert found["model.safetensors"][0].startswith("21 tensors, ")
    assert "rotary_emb.inv_freq passed over" in found["tensors"][1]
    assert found["tokenizer.json"] == ("the tokenizer", "")
    assert found["vocab.json"] == ("", "tokenizer.json decides")
    believed, passed = found["tokenizer_config.json"]
    assert "bos_token" in believed
    assert set(passed.split(", ")) == {"tokenizer_class", "add_bos_token"}
    assert found["tokenizer"] == ("258 tokens, the model has 260", "")
    assert "temperature" in shown


def test_where_the_class_counts(ask, folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert "tokenizer_class" in ask(folder)[0]["tokenizer_config.json"][0]


def test_old_shards_and_too_many_tokens(ask, folder):
    write_model(folder / "old", shards=2)
    for file in (folder / "old").iterdir():
        if file.name != "config.json":
            file.rename(folder / file.name)
    listed = {str(258 + i): {"content": f"[{i}]"} for i in range(3)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    found, _ = ask(folder)
    assert "model.safetensors.index.json passed over" in found["tensors"][1]
    assert found["tokenizer"] == (
        "261 tokens, the model has 260",
        "1 tokens that the model does not have",
    )


def test_a_tokenizer_that_is_refused(ask, folder):
    (folder / "tokenizer.json").unlink()
    believed, passed = ask(folder)[0]["tokenizer"]
    assert believed == ""
    assert "neither tokenizer.json nor tokenizer.model" in passed


@pytest.mark.parametrize("beside", [False, True])
def test_a_gguf_file(beside, ask, small_dir, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    if beside:
        shutil.copy(small_dir / "tokenizer.json", tmp_path)
    found, _ = ask(tmp_path / "m.gguf")
    metadata = found["metadata of m.gguf"]
    assert ("tokenizer.ggml.merges" in metadata[0]) != beside
    assert ("tokenizer.ggml.merges" in metadata[1]) == beside
    assert ("tokenizer.json" in found) == beside


def test_a_checkpoint(ask, small_checkpoint):
    found, _ = ask(small_checkpoint)
    assert "quantization_config" in found["config.json"][0]
    assert "tensors" not in found
