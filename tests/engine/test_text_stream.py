"""Streamed pieces join to the text that the tokenizer makes of all tokens, for every decoder."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine.text_stream import TextStream, text_of
from quatom.engine.vocabulary import Vocabulary

from . import vocabularies
from .doubles import byte_tokenizer
from .vocabularies import ids_of, spell

NAMES = sorted(vocabularies.DECODERS)
TOKENIZERS = {name: vocabularies.make(name) for name in NAMES}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PARTIAL = [0x41, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9]  # of A, 你, 😀 and é


def stream(name, prompt, ids, skip):
    """(pieces, text of what was still open)."""
    made = TextStream(VOCABULARIES[name], prompt, hidden=VOCABULARIES[name].special if skip else ())
    return [made.push(i) for i in ids], made.flush()


def whole_text(name, ids, skip):
    """The tokenizer's text, where a run of byte tokens keeps the whole characters in it.

    ByteFallback by itself shows all bytes of a run as U+FFFD if any of them is no text.
    """
    tokenizer = TOKENIZERS[name]
    if VOCABULARIES[name].spelling is None or name.startswith("byte level"):
        return tokenizer.decode(ids, skip_special_tokens=skip)
    skipped = VOCABULARIES[name].special if skip else set()
    strings, run = [], b""
    shown = tokenizer.convert_ids_to_tokens([i for i in ids if i not in skipped])
    for string in [*(s for s in shown if s is not None), ""]:
        byte = re.fullmatch(r"<0x(..)>", string)
        if byte:
            run += bytes.fromhex(byte[1])
            continue
        while run:
            sizes = [n for n in range(1, 5) if is_text(run[:n])]
            size = sizes[0] if sizes else 1
            strings += [f"<0x{b:02X}>" for b in run[:size]] if sizes else ["\ufffd"]
            run = run[size:]
        strings.append(string)
    return tokenizer.convert_tokens_to_string(strings)


def is_text(data):
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def sequences(name):
    """Token ids: any, and often parts of characters and special tokens."""
    size = len(TOKENIZERS[name])
    known = TOKENIZERS[name].get_vocab()
    parts = [spell(bytes([b])) for b in PARTIAL] + [f"<0x{b:02X}>" for b in PARTIAL]
    frequent = [known[p] for p in [*parts, "<s>", "<|end|>", "▁"] if p in known] or [0]
    ids = st.one_of(st.integers(0, size + 3), st.sampled_from(frequent))  # some past its end
    return st.lists(ids, max_size=14)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name, data):
    prompt, ids = data.draw(sequences(name)), data.draw(sequences(name))
    skip = data.draw(st.booleans())
    pieces, end = stream(name, [], prompt + ids, skip)
    assert "".join(pieces) + end == whole_text(name, prompt + ids, skip)
    hidden = VOCABULARIES[name].special if skip else ()
    for final in (False, True):
        whole = text_of(VOCABULARIES[name], prompt + ids, hidden=hidden, final=final)
        assert whole == "".join(pieces) + end * final
    # After a prompt the same pieces come, though only the prompt's end was read.
    assert stream(name, prompt, ids, skip) == (pieces[len(prompt) :], end)


@pytest.mark.parametrize("name", ["byte fallback", "llama 2", "gemma", "metaspace and bytes"])
@settings(deadline=None, max_examples=20, derandomize=True)
@given(text=st.text("aé你😀😁 ", max_size=12))
def test_byte_tokens_of_a_text_are_the_text(name, text):
    ids = ids_of(TOKENIZERS[name], "a", *(f"<0x{b:02X}>" for b in text.encode()))
    pieces, end = stream(name, ids[:1], ids[1:], True)
    assert "".join(pieces) == text == TOKENIZERS[name].decode(ids)[1:]
    assert end == ""


def bytes_ids(name, data):
    strings = map(spell, (bytes([b]) for b in data))
    if not name.startswith("byte level"):
        strings = (f"<0x{b:02X}>" for b in data)
    return ids_of(TOKENIZERS[name], *strings)


@pytest.mark.parametrize("name", ["byte level", "llama 2"])
def test_a_character_appears_with_its_last_byte(name):
    pieces, end = stream(name, bytes_ids(name, b"a"), bytes_ids(name, "你😀😁b".encode()), True)
    assert pieces == ["", "", "你", "", "", "", "😀", "", "", "", "😁", "b"]
    assert end == ""


@pytest.mark.parametrize("name", ["byte level", "llama 2"])
def test_a_character_that_the_prompt_begins_is_completed(name):
    ids = bytes_ids(name, "a你".encode())
    assert stream(name, ids[:3], ids[3:], True) == (["你"], "")
    assert stream(name, ids[:2], ids[2:], True) == (["", "你"], "")


@pytest.mark.parametrize(("name", "end"), [("byte level", "�"), ("llama 2", "��")])
def test_a_character_that_never_ends_costs_no_other_text(name, end):
    data = "你".encode() + "😀".encode()[:2]
    assert stream(name, [], bytes_ids(name, data), True) == (["", "", "你", "", ""], end)
    broken = bytes_ids(name, data + b"a")
    assert stream(name, [], broken, True) == (["", "", "你", "", "", f"{end}a"], "")


def test_a_token_may_end_inside_a_character():
    # GPT-2 has tokens such as " \xf0\x9f": the space is there at once, the rest when it is whole.
    name = "byte level"
    ids = ids_of(TOKENIZERS[name], spell(b" " + "😀".encode()[:2]), *map(spell, (b"\x98", b"\x80")))
    assert stream(name, [], ids, True) == ([" ", "", "😀"], "")


def test_hidden_special_tokens_do_not_part_a_character():
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    made = TextStream(vocabulary, [], hidden=vocabulary.special)
    first, *rest = "你".encode()
    assert [made.push(i) for i in (first, 257, 258, *rest)] == ["", "", "", "", "你"]


def test_a_prompt_that_ends_in_special_tokens_is_still_context():
    # The first space of a text is dropped, that after "a" is not, whatever is hidden between.
    tokenizer = TOKENIZERS["llama 2"]
    (true,) = ids_of(tokenizer, "▁true")
    prompt = ids_of(tokenizer, "▁a", *["<|end|>", "<s>"] * 20)
    assert stream("llama 2", prompt, [true], True) == ([" true"], "")
    assert stream("llama 2", prompt[1:], [true], True) == (["true"], "")
