"""Text comes in whole characters, its deltas add up, and stop strings never show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatom.engine.detokenize import Detokenizer
from quatom.engine.sampling import SamplingParams

from . import vocabularies
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
    assert pieces(b"\x80\xe4\xbd\xf0ab")[0] == ["�", "", "", "�", "�a", "b", ""]


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


EOS, USER = 257, 258
A, B, C = b"abc"


def stopped(ids, **options):
    """(text, stop string) of tokens."""
    detokenizer = Detokenizer(TOKENIZER, [], SamplingParams(**options))
    text = ""
    for token_id in ids:
        new, hit = detokenizer.append(token_id)
        text += new
        if hit is not None:
            return text + detokenizer.finish(), hit
    return text + detokenizer.finish(), None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("<eos>", {False: "a<user>b", True: "ab"}),
        ("b<eos>", {False: "a<user>", True: "a"}),
        ("<user>b", {False: "a", True: "a"}),
        ("a<user>b<eos>", {False: "", True: ""}),
        ("<user>b<eos>c", {False: "a", True: "a"}),
        ("<user><eos>", None),
        ("b<user>", None),
        ("<pad>", None),
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop, shown, skip, keep):
    text, hit = stopped(
        [A, USER, B, EOS, C],
        stop=[stop, "never"],
        skip_special_tokens=skip,
        include_stop_str_in_output=keep,
    )
    if shown is None:
        assert (text, hit) == ("abc" if skip else "a<user>b<eos>c", None)
    else:
        assert (text, hit) == (shown[skip] + stop * keep, stop)


def test_a_stop_string_without_special_tokens_is_found_in_what_is_shown():
    ids = [A, USER, B, EOS, C]
    assert stopped(ids, stop="bc") == ("a", "bc")
    assert stopped(ids, stop="bc", skip_special_tokens=False) == ("a<user>b<eos>c", None)
    # Part of a special token's name is text where the token is shown, and nothing where it is not.
    assert stopped(ids, stop="os>c", skip_special_tokens=False) == ("a<user>b<e", "os>c")
    assert stopped(ids, stop="os>c") == ("abc", None)
    assert stopped(ids, stop=["bc", "b<eos>"]) == ("a", "b<eos>")  # it ends first


def test_text_held_for_a_stop_string_with_special_tokens_is_not_lost():
    assert stopped([A, USER, B], stop="a<user>b<eos>") == ("ab", None)
    assert stopped([A, USER, B, C, A], stop=["a<user>b<eos>", "ca<eos>"]) == ("abca", None)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    ids=st.lists(st.sampled_from([A, B, USER, EOS]), max_size=12),
    stops=st.lists(
        st.lists(st.sampled_from(["a", "b", "<user>", "<eos>"]), min_size=1, max_size=3).map(
            "".join
        ),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    skip=st.booleans(),
)
def test_stop_strings_are_found_as_soon_as_they_are_there(ids, stops, skip):
    names = {A: "a", B: "b", USER: "<user>", EOS: "<eos>"}
    for count in range(1, len(ids) + 1):
        full = "".join(names[i] for i in ids[:count])
        shown = full.replace("<user>", "").replace("<eos>", "") if skip else full
        found = [s for s in stops if s in (full if "<" in s else shown)]
        if found:
            text, hit = stopped(ids, stop=stops, skip_special_tokens=skip)
            assert hit in found
            head = full[: full.index(hit)] if "<" in hit else shown[: shown.index(hit)]
            assert text == (head.replace("<user>", "").replace("<eos>", "") if skip else head)
            return
    shown = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert stopped(ids, stop=stops, skip_special_tokens=skip) == (shown, None)


def test_a_stop_string_is_found_in_byte_tokens():
    tokenizer = vocabularies.make("llama 2")
    ids = vocabularies.ids_of(tokenizer, "▁a", *(f"<0x{b:02X}>" for b in "你好".encode()), "b")
    detokenizer = Detokenizer(tokenizer, ids[:1], SamplingParams(stop="好"))
    made = [detokenizer.append(i) for i in ids[1:7]]
    assert made == [("", None)] * 2 + [("你", None)] + [("", None)] * 2 + [("", "好")]
    assert detokenizer.finish() == ""
