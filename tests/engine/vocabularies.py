"""Small tokenizers, one for each decoder of the tokenizers library and each chain in use."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from .doubles import byte_level_table

BYTES = [f"<0x{b:02X}>" for b in range(256)]
CHAR_OF = {byte: char for char, byte in byte_level_table().items()}


def spell(data: bytes) -> str:
    """A token string of ByteLevel."""
    return "".join(CHAR_OF[b] for b in data)


SPACED = ["▁", "▁▁", "▁a", "a", "b", "▁true", "true", "é", "▁é", ".", "▁.", "你"]
BYTE_LEVEL = [spell(bytes([b])) for b in range(256)] + [
    spell(part)
    for text in (" a", "true", " true", "é", "你好", "😀", "a😀")
    for part in (text.encode(), text.encode()[:-1], b" " + text.encode()[:2], text.encode()[1:])
]
PIECES = ["a", "b", "##a", "##é", ".", "!", "'s", "n't", "do", " ", "你", "", "##"]
SUFFIXED = ["a", "b", "a</w>", "b</w>", "</w>", "é</w>", ".", "你", "你</w>"]
SPEECH = ["a", "b", "|", "<pad>", "é", ".", "'s", "|a", "a|", ""]

llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
strip = decoders.Strip(" ", 1, 0)

DECODERS = {
    "none": (None, PIECES),
    "byte level": (decoders.ByteLevel(), BYTE_LEVEL),
    "byte level in a sequence": (decoders.Sequence([decoders.ByteLevel(), strip]), BYTE_LEVEL),
    "byte fallback": (decoders.ByteFallback(), SPACED + BYTES),
    "llama 2": (decoders.Sequence([*llama, strip]), SPACED + BYTES),
    "gemma": (decoders.Sequence(llama), SPACED + BYTES),
    "metaspace": (decoders.Metaspace(), SPACED),
    "metaspace, first": (decoders.Metaspace(prepend_scheme="first"), SPACED),
    "metaspace, never": (decoders.Metaspace(prepend_scheme="never"), SPACED),
    "metaspace and bytes": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        SPACED + BYTES,
    ),
    "word piece": (decoders.WordPiece(), PIECES),
    "word piece, as it is": (decoders.WordPiece("##", cleanup=False), PIECES),
    "bpe": (decoders.BPEDecoder(), SUFFIXED),
    "ctc": (decoders.CTC(), SPEECH),
    "ctc, as it is": (decoders.CTC("<pad>", "|", cleanup=False), SPEECH),
    "fuse": (decoders.Fuse(), PIECES),
    "strip": (decoders.Strip("a", 1, 0), PIECES),
    # The library itself panics where there is nothing left to strip at the right.
    "strip at the right": (decoders.Strip("a", 0, 1), [p for p in PIECES if p]),
    "fused, then stripped": (
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        SPACED,
    ),
    "replace": (decoders.Replace("a", "bb"), PIECES),
}


def make(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that decodes as its name says; `<s>` and `<|end|>` are special."""
    decoder, strings = DECODERS[name]
    vocab = {string: i for i, string in enumerate(dict.fromkeys(["<unk>", *strings]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "<|end|>", "<｜other｜>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("ö", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")


def ids_of(tokenizer, *strings: str) -> list[int]:
    """Token ids of token strings."""
    known = tokenizer.get_vocab()
    return [known[string] for string in strings]


def encoding_llama() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind that reads text: characters, bytes where they are unknown."""
    strings = ["<unk>", *SPACED, *BYTES, *"cdefghrtu<>|:", "tr", "tru", "<s>", "<|end|>"]
    vocab = {string: i for i, string in enumerate(strings)}
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ("▁", "true"), ("▁", "a")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence([*llama, strip])
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast
