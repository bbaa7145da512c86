"""Tokenizers from the metadata of GGUF files: defaults, damage, SentencePiece."""

import pytest

from quatom.checkpoint.reader import open_source
from quatom.checkpoint.tokenizer import tokenizer_from_source
from quatom.errors import CheckpointError, ModelError
from tests.checkpoint.gguf_models import MERGES, WORDS, write_gguf


def read(path, **options):
    write_gguf(path / "model.gguf", **options)
    return tokenizer_from_source(open_source(path))


@pytest.mark.parametrize(
    ("pre", "keys", "before", "behind"),
    [
        ("llama-bpe", {}, [0], []),  # llama.cpp's default for this type
        ("llama-bpe", {"ggml.add_bos_token": False}, [], []),
        ("qwen2", {}, [], []),
        ("qwen2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [0], [1]),
        ("smollm", {"ggml.add_eos_token": True}, [], [1]),
        ("gpt-2", {"ggml.add_bos_token": True, "ggml.bos_token_id": None}, [], []),
    ],
)
def test_what_begins_and_ends_a_text(pre, keys, before, behind, tmp_path):
    tokenizer = read(tmp_path, pre=pre, tokenizer=keys)
    assert tokenizer("ab")["input_ids"] == [*before, 2, 3, *behind]
    assert tokenizer("ab", "c")["input_ids"] == [
        *before, 2, 3, *behind, *before, 4, *behind
    ]  # fmt: skip
    assert tokenizer.encode("ab", add_special_tokens=False) == [2, 3]


REFUSED = {
    "no pattern": ({"ggml.pre": None}, ModelError, "'gpt2' with no tokenizer.ggml.pre"),
    "an unknown pattern": ({"ggml.pre": "gemma"}, ModelError, "with pre-tokenizer 'gemma'"),
    "an unknown kind": ({"ggml.model": "bert"}, ModelError, "tokenizer 'bert'"),
    "no tokenizer": ({"ggml.model": None}, CheckpointError, "holds no tokenizer"),
    "no tokens": ({"ggml.tokens": None}, CheckpointError, "lacks tokenizer.ggml.tokens"),
    "no merges": ({"ggml.merges": None}, CheckpointError, "lacks tokenizer.ggml.merges"),
    "merges of unknown pieces": (
        {"ggml.merges": [*MERGES, "a z"]},
        CheckpointError,
        "joins 'a' and 'z', which are not all tokens",
    ),
    "merges into an unknown piece": (
        {"ggml.merges": [*MERGES, "a b"]},
        CheckpointError,
        "joins 'a' and 'b', which are not all tokens",
    ),
    "a merge of one piece": (
        {"ggml.merges": [*MERGES, "ab"]},
        CheckpointError,
        "joins 'ab' and '', which are not all tokens",
    ),
    "a token twice": (
        {"ggml.tokens": [*WORDS[:-1], "a"]},
        CheckpointError,
        "ggml.tokens holds 'a' more than once",
    ),
    "a flag that is a number": (
        {"ggml.add_bos_token": 1},
        CheckpointError,
        "add_bos_token must be true or false, got 1",
    ),
    "a template that is a number": (
        {"chat_template": 5},
        CheckpointError,
        "chat_template must be a text, got 5",
    ),
    "ends of turn in a list": (
        {"ggml.eot_token_id": [1, 2]},
        ModelError,
        r"must be an integer or a list of integers",
    ),
    "a pattern that is a list": ({"ggml.pre": ["a"]}, ModelError, r"with pre-tokenizer \['a'\]"),
    "merges that are numbers": (
        {"ggml.merges": [1, 2]},
        CheckpointError,
        "ggml.merges must hold str values",
    ),
    "an unknown-token id of -1": (
        {"ggml.unknown_token_id": 2**32 - 1},
        CheckpointError,
        rf"unknown_token_id is 4294967295, and there are {len(WORDS)} tokens",
    ),
    "a first token behind the last": (
        {"ggml.bos_token_id": len(WORDS)},
        CheckpointError,
        f"bos_token_id is {len(WORDS)}, and",
    ),
    "types of fewer tokens": (
        {"ggml.token_type": [1, 1]},
        CheckpointError,
        f"token_type has 2 entries for {len(WORDS)} tokens",
    ),
    "no scores": (
        {"ggml.model": "llama"},
        CheckpointError,
        "lacks tokenizer.ggml.scores",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_in_one_line(fault, tmp_path):
    change, kind, message = REFUSED[fault]
    with pytest.raises(kind, match=message) as caught:
        read(tmp_path, tokenizer=change)
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_tokens_without_a_name_keep_their_ids(tmp_path):
    """llama.cpp calls them so."""
    words = [*WORDS[:2], "", *WORDS[3:]]
    tokenizer = read(tmp_path, tokenizer={"ggml.tokens": words})
    assert tokenizer.convert_ids_to_tokens([2, 3]) == ["[EMPTY_2]", WORDS[3]]
    assert tokenizer("b")["input_ids"] == [3]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model trained on Python's documentation, and its processor."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    file = folder / "tokenizer.model"
    return file, sentencepiece.SentencePieceProcessor(model_file=str(file))


TEXTS = [
    "The lists of Python, like those of others, hold objects.",
    "  two  spaces   and\n\ttabs\n\n    return x[0:1]  # Grüße 😀 ",
    "<0x0A> 12345 3.14e-7 a_b",
    "x",
]


def describe(processor) -> dict:
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    ids = range(processor.vocab_size())
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "ggml.scores": [processor.get_score(i) for i in ids],
        "ggml.token_type": [
            next((kind for name, kind in kinds.items() if getattr(processor, name)(i)), 1)
            for i in ids
        ],
        "ggml.merges": None,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
    }


def test_sentencepiece_metadata_cuts_as_sentencepiece(pieces, tmp_path):
    _, processor = pieces
    tokenizer = read(tmp_path, tokenizer=describe(processor))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *processor.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # A space begins every text, also behind a special token, and a special token is one token.
    assert tokenizer("a</s>b")["input_ids"] == [
        1,
        *processor.encode("a"),
        2,
        *processor.encode("b"),
    ]


def test_sentencepiece_metadata_without_the_first_space(pieces, tmp_path):
    _, processor = pieces
    change = describe(processor) | {"ggml.add_space_prefix": False, "ggml.add_bos_token": False}
    tokenizer = read(tmp_path, tokenizer=change)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert processor.encode(" " + text) == tokenizer(" " + " " + text)["input_ids"]
        assert tokenizer.decode(ids) == text
