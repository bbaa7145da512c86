"""tokenizer.model without transformers: the processor of SentencePiece itself is the judge."""

import pytest

from quatom.checkpoint.tokenizer_sentencepiece import read_model
from quatom.errors import CheckpointError

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

TEXTS = [
    "The lists of Python, like those of others, hold objects.",
    "  two  spaces   and\n\ttabs\n\n    return x[0:1]  # Grüße 😀 ",
    "ﬁne ½ Ｗide e\u0301 12345",
    "x",
]
VARIANTS = {
    "as Llama": {},
    "as Gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "[tag]"]},
    "composed": {"normalization_rule_name": "nmt_nfkc"},
    "fewer spaces": {"remove_extra_whitespaces": True},
    "unknown characters": {"byte_fallback": False},
}


def train(folder, **changes):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:100_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 500,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        num_threads=1,
        minloglevel=2,
        **options | changes,
    )
    file = folder / "tokenizer.model"
    return file, sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_cut_as_sentencepiece_cuts_it(variant, tmp_path):
    file, processor = train(tmp_path, **VARIANTS[variant])
    core = read_model(file)
    assert core.get_vocab_size() == processor.vocab_size()
    for text in [*TEXTS, "a[tag]b \n\n c"]:
        assert core.encode(text).ids == processor.encode(text), text


REFUSED = {
    "another kind": ({"model_type": "unigram"}, "of kind unigram, and BPE is what is read"),
    "a space after words": ({"treat_whitespace_as_suffix": True}, "elsewhere than before words"),
    "symbols and a prefix": ({"user_defined_symbols": ["[tag]"]}, "user-defined symbols"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(fault, tmp_path):
    changes, message = REFUSED[fault]
    file, _ = train(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff"])
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a SentencePiece model") as caught:
        read_model(tmp_path / "tokenizer.model")
    assert "\n" not in str(caught.value)
