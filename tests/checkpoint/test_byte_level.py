"""Pieces that tokenizer.ggml.pre stands for, cut by hand after llama.cpp's patterns."""

import pytest
from tokenizers import decoders

from quatom.checkpoint.byte_level import PATTERNS
from tests.checkpoint.gguf_models import WORDS
from tests.checkpoint.test_tokenizer_gguf import read

# Contractions, a number after a space, marks before a line end, spaces, and letters without case.
TEXT = "It'S 12345 x+=y(1.5);\n\n  Z \u4f60\u597d\u3002a\u00e9B"
DIGITS = "It|'|S| |1|2|3|4|5| x|+=|y|(|1|.|5|);|\n\n | Z| \u4f60\u597d|\u3002|a\u00e9B"
PIECES = {
    "gpt-2": "It|'|S| 12345| x|+=|y|(|1|.|5|);|\n\n | Z| \u4f60\u597d|\u3002|a\u00e9B",
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "smollm": DIGITS,
    "qwen2": "It|'S| |1|2|3|4|5| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9B",
    "dbrx": "It|'S| |123|45| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9B",
    "llama-bpe": "It|'S| |123|45| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9B",
    "tekken": "It|'S| |1|2|3|4|5| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9|B",
    "gpt-4o": "It'S| |123|45| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9|B",
    "seed-coder": "It|'S| |1|2|3|4|5| x|+=|y|(|1|.|5|);|\n\n| | Z| \u4f60\u597d|\u3002a\u00e9B",
    "minicpm5": "It|'S| |123|45| x|+=|y|(|1|.|5|);\n\n| | Z| \u4f60\u597d|\u3002a\u00e9B",
    # Its marks, : to ~, hold A to z: letters of ASCII are cut from others.
    "deepseek-llm": (
        "It|'|S| |1|2|3|4|5| x|+=|y|(|1|.|5|);|\n|\n| | Z| |\u4f60\u597d|\u3002|a|\u00e9|B"
    ),
    "deepseek-coder": (
        "It|'|S| |1|2|3|4|5| x|+=|y|(|1|.|5|);|\n|\n| | Z| |\u4f60\u597d|\u3002|a\u00e9B"
    ),
    "deepseek-v3": "It|'S| |123|45| x|+=|y|(|1|.|5|);\n\n| | Z| |\u4f60\u597d|\u3002|a\u00e9B",
    "falcon": "It|'|S| |123|45| x|+=|y|(|1|.|5|);|\n\n | Z| \u4f60\u597d|\u3002|a\u00e9B",
    "poro-chat": "It'S| 12345| x+=y|(|1|.|5|)|;|\n\n | Z| \u4f60\u597d|\u3002|a\u00e9B",
    "viking": "It'S| |1|2|3|4|5| x+=y|(|1|.|5|)|;|\n\n | Z| \u4f60\u597d|\u3002|a\u00e9B",
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name):
    cut = PATTERNS[name].pre_tokenizer().pre_tokenize_str(TEXT)
    decoder = decoders.ByteLevel()
    assert "|".join(decoder.decode([piece]) for piece, _ in cut) == PIECES[name]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_name_is_read_and_merges_in_its_pieces(name, tmp_path):
    """WORDS merge 1, 2 and 3 to 123, which patterns of single digits prevent."""
    tokenizer = read(tmp_path, pre=name, tokenizer={"ggml.add_bos_token": False})
    pieces = [p for p, _ in PATTERNS[name].pre_tokenizer().pre_tokenize_str("a123")]
    joined = "123" in "".join(p for p in pieces if "3" in p and "1" in p)
    ids = [WORDS.index("a"), *map(WORDS.index, ["123"] if joined else "123")]
    assert tokenizer("a123")["input_ids"] == ids
