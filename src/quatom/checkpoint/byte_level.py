"""How byte-level BPE cuts text into pieces before merging, by the names of `tokenizer.ggml.pre`.

A name stands for steps in the form of the tokenizers library. Where llama.cpp approximates a
model's pattern, for instance upper and lower case by ASCII letters, the model's own is here.

Names that are missing need code of their own in llama.cpp, or ("default") stand for the pattern of
a converter that did not know the model.

Source: the models' tokenizer.json files for patterns; llama.cpp, src/llama-vocab.cpp, for names and
defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

DIGITS, PUNCTUATION = "each digit", "runs of punctuation"
"""Steps that are no patterns."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD, _SIGNS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|{_SPACES}"
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
# Words begin with capitals, as in TitleCase.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDING"
    rf"|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}"
)
_TEKKEN = _CASED.replace("ENDING", "")
_GPT4O = _CASED.replace("ENDING", f"{_CONTRACTIONS}?").replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK3 = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# Letters that have a case, as DeepSeek LLM lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"


@dataclass(frozen=True, slots=True)
class Pattern:
    """How byte-level BPE prepares text."""

    steps: tuple[str, ...]
    """Patterns, and steps by name; each cuts the pieces of the one before."""
    compose: bool = False
    """Normalize to NFC, as in training; llama.cpp leaves text as it is."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole."""
    add_bos: bool = False
    """Begin texts with the BOS token where no key says so."""

    def pre_tokenizer(self) -> "PreTokenizer":
        """The steps, then bytes as characters."""
        from tokenizers import Regex, pre_tokenizers

        named = {
            DIGITS: lambda: pre_tokenizers.Digits(individual_digits=True),
            PUNCTUATION: lambda: pre_tokenizers.Punctuation("contiguous"),
        }
        steps = [
            named[step]() if step in named else pre_tokenizers.Split(Regex(step), "isolated")
            for step in self.steps
        ]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*steps, last])

    def tokenizer(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> "Tokenizer":
        """Byte-level BPE of these tokens and merges, the first merge first."""
        from tokenizers import Tokenizer, decoders, models, normalizers, processors

        core = Tokenizer(
            models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=self.ignore_merges)
        )
        if self.compose:
            core.normalizer = normalizers.NFC()
        core.pre_tokenizer = self.pre_tokenizer()
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=False)
        return core


_gpt2, _digits = Pattern((_GPT2,)), Pattern((DIGITS, _GPT2))
_qwen2, _dbrx = Pattern((_QWEN2,)), Pattern((_LLAMA3,))
_llama3 = replace(_dbrx, ignore_merges=True, add_bos=True)
_deepseek3 = Pattern((r"\p{N}{1,3}", _CJK3, _DEEPSEEK3))
_BY_PATTERN: dict[str, Pattern] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum": _gpt2,
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _digits,
    "qwen2": replace(_qwen2, compose=True),
    "deepseek-r1-qwen stablelm2 megrez hunyuan kormo solar-open grok-2": _qwen2,
    "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _llama3,
    "dbrx smaug-bpe glm4 chatglm-bpe": _dbrx,
    "minicpm5": Pattern((r"\p{N}{1,3}", _QWEN2.replace(r"\p{N}|", r"\p{N}+|")), ignore_merges=True),
    "tekken": Pattern((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": Pattern((_GPT4O,)),
    "seed-coder": Pattern((_SEED_CODER,)),
    "deepseek-llm": Pattern(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_MARKS}]+", r"\s+$", _CJK, DIGITS)
    ),
    "deepseek-coder": Pattern((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGITS)),
    "deepseek-v3 hunyuan-dense joyai-llm": _deepseek3,
    "falcon": Pattern((PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": Pattern((_BLOOM,)),
    "viking": Pattern((_BLOOM, DIGITS)),
}
PATTERNS: Mapping[str, Pattern] = {
    name: pattern for names, pattern in _BY_PATTERN.items() for name in names.split()
}
"""By tokenizer.ggml.pre."""
