"""Text comes in whole characters, its deltas add up, and stop strings never show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine.detokenize import Detokenizer
from quatom.engine.sampling import SamplingParams

from .doubles import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces(data, **options):
    detokenizer = Detokenizer(TOKENIZER, [], SamplingParams(**options))
    made = []
    for byte in data:
        text, hit = detokenizer.append(byte)
        made.append(text)
        if hit is not None:
            return [*made, detokenizer.finish()], hit
    return [*made, detokenizer.finish()], None


def test_a_character_appears_when_its_last_byte_is_there():
    assert pieces("aé你🤗b".encode())[0] == [
        "a", "", "é", "", "", "你", "", "", "", "🤗", "b", "",
    ]  # fmt: skip


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    # A stray continuation byte, then two starts of characters that never end, then text.
    assert pieces(b"\x80\xe4\xbd\xf0ab")[0] == ["", "�", "", "�", "�a", "b", ""]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40))
def test_deltas_add_up_to_the_whole_text(data):
    assert "".join(pieces(data)[0]) == TOKENIZER.decode(list(data))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one END two", "one "),
        ("EN is no end, EEND is", "EN is no end, E"),
        ("no stop EN", "no stop EN"),
        ("é你ENDé", "é你"),
    ],
)
def test_a_stop_string_is_never_shown(text, shown):
    made, hit = pieces(text.encode(), stop=["END", "ENDING"])
    assert "".join(made) == shown
    assert hit == (None if "END" not in text else "END")


def test_the_earliest_stop_string_wins():
    made, hit = pieces(b"a fox, a dog", stop=["dog", "fox"])
    assert ("".join(made), hit) == ("a ", "fox")


def test_text_after_a_prompt_keeps_its_leading_space():
    detokenizer = Detokenizer(TOKENIZER, list(b"hello"), SamplingParams())
    assert detokenizer.append(ord(" ")) == (" ", None)
