"""What single tokens are: their own bytes, whatever they are next to."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine.text_stream import TextStream
from quatom.engine.vocabulary import BYTE_FALLBACK, BYTE_LEVEL, Vocabulary, vocabulary_of

from . import vocabularies
from .vocabularies import ids_of, spell

TOKENIZERS = {name: vocabularies.make(name) for name in vocabularies.DECODERS}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}

CASES = [
    ("byte level", spell(b" true"), b" true"),
    ("byte level", spell(b"\xe4"), b"\xe4"),
    ("byte level", spell(b" \xf0\x9f"), b" \xf0\x9f"),
    ("byte level", "<｜other｜>", "<｜other｜>".encode()),
    ("llama 2", "▁true", b" true"),
    ("llama 2", "true", b"true"),
    ("llama 2", "▁", b" "),
    ("llama 2", "a", b"a"),
    ("llama 2", "<0x0A>", b"\n"),
    ("llama 2", "<0xE4>", b"\xe4"),
    ("llama 2", "<|end|>", b"<|end|>"),
    ("llama 2", "<tool>", b"<tool>"),
    ("metaspace", "▁true", b" true"),
    ("metaspace", "true", b"true"),
    ("word piece", "do", b" do"),
    ("word piece", "##a", b"a"),
    ("word piece", "n't", b"n't"),
    ("bpe", "a</w>", b"a "),
    ("bpe", "a", b"a"),
    ("ctc", "a", b"a"),
    ("ctc", "|", b" "),
    ("ctc", "<pad>", b""),
    ("fuse", "a", b"a"),
    ("none", "a", b" a"),
]


@pytest.mark.parametrize(("name", "string", "data"), CASES)
def test_the_bytes_of_a_token(name, string, data):
    (token_id,) = ids_of(TOKENIZERS[name], string)
    assert VOCABULARIES[name].token_bytes(token_id) == data


@pytest.mark.parametrize("name", ["llama 2", "byte level", "word piece"])
def test_an_id_without_a_token(name):
    vocabulary = VOCABULARIES[name]
    assert vocabulary.token(len(TOKENIZERS[name])) is None
    assert vocabulary.token_bytes(len(TOKENIZERS[name])) is None


def test_how_decoders_spell_bytes():
    spellings = {name: vocabulary.spelling for name, vocabulary in VOCABULARIES.items()}
    assert {n for n, s in spellings.items() if s is BYTE_LEVEL} == {
        "byte level",
        "byte level in a sequence",
    }
    assert {n for n, s in spellings.items() if s is BYTE_FALLBACK} == {
        "byte fallback",
        "llama 2",
        "gemma",
        "metaspace and bytes",
    }
    assert vocabulary_of(TOKENIZERS["gemma"]) is vocabulary_of(TOKENIZERS["gemma"])


@pytest.mark.parametrize(
    "name", ["byte level", "byte fallback", "llama 2", "gemma", "metaspace", "word piece", "fuse"]
)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_the_bytes_of_tokens_join_to_the_text(name, data):
    vocabulary, tokenizer = VOCABULARIES[name], TOKENIZERS[name]
    prompt = ids_of(tokenizer, "a")
    count = len(tokenizer) - len(vocabulary.special) - 2  # without added tokens
    ids = data.draw(st.lists(st.integers(1, count - 1), max_size=10))
    text = TextStream(vocabulary, prompt)
    shown = "".join(text.push(i) for i in ids)
    joined = b"".join(vocabulary.token_bytes(i) for i in ids)
    # Where bytes are no text both show U+FFFD, byte-fallback decoders one for each byte.
    assert shown + text.flush() == joined.decode(errors=getattr(vocabulary.spelling, "errors", ""))
