"""Which files and keys of a model were believed, and which were passed over."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatom.checkpoint.reader import TensorSource
from quatom.checkpoint.tokenizer import only_in_gguf, tokenizer_from_source
from quatom.checkpoint.tokenizer_folder import class_counts
from quatom.checkpoint.tokenizer_settings import CONFIG, READ, READ_BY_CLASS
from quatom.checkpoint.validation import read_json
from quatom.errors import QuatomError
from quatom.families.keys import Keys
from quatom.families.registry import find_family

_OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Finding:
    """A file, or a group of keys in one."""

    place: str
    believed: str
    """What was read of it; empty: nothing."""
    passed_over: str = ""
    """What was not, and why."""


def diagnose(source: TensorSource) -> list[Finding]:
    """What was believed of an opened model, place by place."""
    findings = _metadata(source) if source.gguf is not None else _configuration(source)
    names = sorted(file.name for file in source.files)
    total = sum(file.stat().st_size for file in source.files)
    findings.append(
        Finding(_list(names), f"{len(source.names())} tensors, {total / 1e6:.1f} MB in all")
    )
    findings += [Finding("tensors", "", note) for note in source.notes]
    return findings + _tokenizer(source)


def _configuration(source: TensorSource) -> list[Finding]:
    config = source.config_dict
    keys = Keys(config)
    find_family(config).read(keys)
    always = ("architectures", "model_type", "quantization_config")
    passed = [key for key in keys.passed_over() if key not in always]
    findings = [
        Finding("config.json", _list(key for key in config if key not in passed), _list(passed))
    ]
    if (source.folder / "generation_config.json").exists():
        data = read_json(source.folder / "generation_config.json")
        findings.append(_keys("generation_config.json", data, ("eos_token_id",)))
    return findings


def _metadata(source: TensorSource) -> list[Finding]:
    from quatom.checkpoint.gguf_file import read_gguf

    assert source.gguf is not None
    keys = read_gguf(source.gguf).metadata
    prefix = f"{keys['general.architecture']}."
    read = ["general.architecture", *(key for key in keys if key.startswith(prefix))]
    read += ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"]
    if only_in_gguf(source):
        read += [key for key in keys if key.startswith("tokenizer.")]
    return [_keys(f"metadata of {source.gguf.name}", keys, read)]


def _tokenizer(source: TensorSource) -> list[Finding]:
    folder = source.folder
    findings = []
    files = [name for name in ("tokenizer.json", *_OTHER_TOKENIZERS) if (folder / name).exists()]
    if not only_in_gguf(source) and files:
        chosen = ["tokenizer.json"] if "tokenizer.json" in files else files
        findings.append(Finding(_list(chosen), "the tokenizer"))
        if others := [name for name in files if name not in chosen]:
            findings.append(Finding(_list(others), "", "tokenizer.json decides"))
        if (folder / CONFIG).exists():
            settings = read_json(folder / CONFIG)
            by_class = READ_BY_CLASS if class_counts(folder, settings) else ()
            findings.append(_keys(CONFIG, settings, (*READ, *by_class)))
    try:
        tokenizer = tokenizer_from_source(source)
    except QuatomError as error:
        return [*findings, Finding("tokenizer", "", str(error))]
    size, known = len(tokenizer), source.model_config.vocab_size
    excess = f"{size - known} tokens that the model does not have" if size > known else ""
    return [*findings, Finding("tokenizer", f"{size} tokens, the model has {known}", excess)]


def _keys(place: str, data: Mapping[str, Any], read: Iterable[str]) -> Finding:
    wanted = set(read)
    return Finding(
        place,
        _list(key for key in data if key in wanted),
        _list(key for key in data if key not in wanted),
    )


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def as_rows(findings: Iterable[Finding], folder: Path) -> list[tuple[str, str, str]]:
    """Rows of a table, paths in the model's folder shortened."""
    return [(f.place, f.believed, f.passed_over.replace(f"{folder}/", "")) for f in findings]
