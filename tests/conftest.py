"""Tiny random models and a byte tokenizer, made on the spot: no test needs a hub."""

import gc
import json
import logging
import os
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import gpu_share

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_model(folder: Path, config: dict, *, seed: int = 0, dtype=torch.float32, **save) -> Path:
    """A random Hugging Face model with planted outlier channels, and a byte tokenizer."""
    import transformers

    torch.manual_seed(seed)
    options = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = kinds[config["model_type"]]
    model = model_class(config_class(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                # A few large channels, as trained models have: what outlier handling is for.
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                parameter[torch.randperm(parameter.numel())[:8]] *= 20.0
            else:
                parameter.normal_(std=0.06)
    model.to(dtype).save_pretrained(folder, **save)
    write_byte_tokenizer(folder)
    return folder


def quick(recipe, calibration):
    """The recipe on little text; what goes step by step takes few steps."""
    weights, tuning = recipe.weights, recipe.tuning
    if getattr(weights.rounder, "descent_sweeps", 0) > 1:  # a further one does the same again
        weights = replace(weights, rounder=replace(weights.rounder, descent_sweeps=1))
    if tuning is not None:
        tuning = replace(tuning, steps=3, sequences=2)
    return replace(recipe, calibration=calibration, weights=weights, tuning=tuning)


def write_byte_tokenizer(folder: Path) -> None:
    """Every byte is a token; 256 begins a text, 257 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    vocab |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """Llama, 2 blocks, hidden 256, GQA, head_dim 64, float32."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", LLAMA)


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory) -> Path:
    """Qwen2, 2 blocks, QKV biases, tied embeddings, float32."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen2", QWEN2, seed=1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """40 KB of English: the licence again and again, the same with every version of Python."""
    text = ((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8") * 4)[:40_000]
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def device() -> str:
    """Where kernels run: a GPU if there is one, else the CPU under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def serve_in_process():
    """Undoes what `quatom serve` changes in its process: log handlers and the answer to SIGTERM."""
    loggers = [logging.getLogger(name) for name in ("quatom", "uvicorn", "uvicorn.error")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def few_certificates(tmp_path_factory):
    """One trusted authority: a client reads all that the machine has, which takes 70 ms each.

    Tests of kernels also run where trustme is not installed, on GPU machines.
    """
    if find_spec("trustme") is None:
        yield
        return
    import trustme

    path = tmp_path_factory.mktemp("authority") / "authority.pem"
    trustme.CA().cert_pem.write_to_path(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(path))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_checks_without_effect():
    """Triton's interpreter computes whether integers overflow; without `debug` nobody looks."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


@pytest.fixture
def whole_gpu() -> None:
    """For tests that compare the memory of the whole GPU: they are exact where nobody shares it."""
    if reason := gpu_share.why_shared():
        pytest.skip(f"this test measures the memory of the whole GPU, which is shared: {reason}")


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end it goes like everything else; libraries report what is left."""
    gc.unfreeze()


def pytest_configure(config) -> None:
    """Kernels run in Triton's interpreter where there is no GPU; must be set before import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
