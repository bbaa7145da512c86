"""Which of a folder's tokenizer files are believed. Right is what the tokenizers library reads."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from quatom.checkpoint.tokenizer_folder import read_folder
from quatom.errors import CheckpointError
from tests.checkpoint.test_tokenizer_gguf import TEXTS, pieces  # noqa: F401

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
TEXT = "a  1 it'S 12345\n\n  return  x"


def byte_level(*steps, merges=(("Ġ", "Ġ"), ("1", "2"), ("12", "3"))):
    """BPE over bytes; `steps` come before the byte level."""
    vocab = {symbol: index for index, symbol in enumerate(ALPHABET)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return core


def word_level():
    core = Tokenizer(models.WordLevel({"a": 0, "1": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def write(folder, core=None, config=None, **settings):
    if core is not None:
        core.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


CORES = {
    "digits alone": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(pre_tokenizers.Split(Regex(SPLIT), "isolated")),
    "no pattern": lambda: byte_level(pre_tokenizers.Split(Regex(r"\n"), "isolated")),
    "words": word_level,
}
CLASSES = ["GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "BertTokenizer", "Unheard"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", CORES)
def test_tokenizer_json_decides_whatever_class_is_named(kind, name, tmp_path):
    core = CORES[kind]()
    folder = write(tmp_path, core, {"model_type": "qwen2"}, tokenizer_class=name)
    assert read_folder(folder)(TEXT)["input_ids"] == core.encode(TEXT).ids
    assert len(core.encode(TEXT).ids) > 0


def test_it_needs_no_other_file(tmp_path):
    core = byte_level()
    assert read_folder(write(tmp_path, core))(TEXT)["input_ids"] == core.encode(TEXT).ids


def test_saved_truncation_and_padding_do_not_count(tmp_path):
    core = byte_level()
    want = core.encode(TEXT).ids
    core.enable_truncation(4)
    core.enable_padding(length=500)
    assert read_folder(write(tmp_path, core))(TEXT)["input_ids"] == want


def template(core, text):
    ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>") if token in text]
    core.post_processor = processors.TemplateProcessing(single=text, special_tokens=ids)
    return core


@pytest.mark.parametrize(
    ("post", "settings", "pattern"),
    [
        ("<s> $A", {"add_bos_token": False}, "b-"),  # the file says it
        ("$A </s>", {"tokenizer_class": "LlamaTokenizer"}, "-e"),
        ("$A", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, "-"),
        # The file says nothing: what transformers 4 did for the class.
        (None, {"tokenizer_class": "LlamaTokenizerFast"}, "b-"),
        (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "-"),
        (None, {"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}, "b-e"),
        (None, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, "-"),
        (None, {"add_bos_token": True}, "-"),
        ("bytes", {"tokenizer_class": "LlamaTokenizerFast"}, "b-"),
        ("bytes", {"tokenizer_class": "PreTrainedTokenizerFast"}, "-"),
    ],
)
def test_what_begins_and_ends_a_text(post, settings, pattern, tmp_path):
    core = byte_level()
    if post == "bytes":
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    elif post is not None:
        core = template(core, post)
    folder = write(tmp_path, core, bos_token="<s>", eos_token={"content": "</s>"}, **settings)
    tokenizer = read_folder(folder)
    ids = {"b": tokenizer.bos_token_id, "e": tokenizer.eos_token_id}
    assert None not in ids.values()
    want = [
        i
        for mark in pattern
        for i in ([ids[mark]] if mark in ids else core.encode("ab", add_special_tokens=False).ids)
    ]
    assert tokenizer("ab")["input_ids"] == want


def test_special_tokens_are_one_token_and_added_ones_get_their_listed_ids(tmp_path):
    core = byte_level()
    size = core.get_vocab_size()
    listed = {str(size): {"content": "<think>", "special": False, "normalized": False}}
    folder = write(tmp_path, core, added_tokens_decoder=listed, bos_token="<s>")
    tokenizer = read_folder(folder)
    assert tokenizer("<s><think>")["input_ids"] == [core.token_to_id("<s>"), size]
    listed = {str(size + 3): {"content": "<think>"}}
    write(tmp_path, core, added_tokens_decoder=listed)
    with pytest.raises(CheckpointError, match=rf"'<think>' is {size} in .* and {size + 3} in"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("GPT2Tokenizer", byte_level),
        (
            "Qwen2TokenizerFast",
            lambda: byte_level(
                pre_tokenizers.Split(
                    Regex(
                        SPLIT.replace("{1,3}", "").replace(r"|\s+", r"|\s*[\r\n]+|\s+(?!\S)|\s+")
                    ),
                    "isolated",
                )
            ),
        ),
    ],
)
def test_vocab_and_merges_alone_are_read_by_the_class_that_is_named(name, core, tmp_path):
    core = core()
    core.model.save(str(tmp_path))
    folder = write(tmp_path, tokenizer_class=name)
    assert read_folder(folder)(TEXT)["input_ids"] == core.encode(TEXT).ids


def no_sentencepiece(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)


REFUSED = {
    "nothing": ({}, "neither tokenizer.json nor tokenizer.model"),
    "a newer library": (
        {"tokenizer.json": '{"version": "2.0", "model": {"type": "Diffusion"}}'},
        r"tokenizer.json cannot be read by tokenizers \d.*pip install -U tokenizers",
    ),
    "no JSON": ({"tokenizer.json": "{"}, "cannot be read by tokenizers"),
    "vocabulary and merges of no class": (
        {"vocab.json": "{}", "merges.txt": ""},
        "gives the class None: how text is cut is known of GPT2Tokenizer and Qwen2Tokenizer",
    ),
    "vocabulary and merges of another class": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "X"}'},
        "gives the class 'X'",
    ),
    "merges of unknown pieces": (
        {
            "vocab.json": '{"a": 0}',
            "merges.txt": "#version: 0.2\na b\n",
            "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}',
        },
        "cannot read vocab.json and merges.txt of",
    ),
    "tokenizer.model without its package": (
        {"tokenizer.model": "x"},
        r"which are not installed: pip install 'quatom\[sentencepiece\]",
    ),
    "tokenizer.model of another kind": (
        {"tokenizer.model": "x", "tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'},
        "how the class 'T5Tokenizer' reads it is not known",
    ),
    "a special token that is a number": (
        {"tokenizer.json": byte_level().to_str(), "tokenizer_config.json": '{"bos_token": 3}'},
        "bos_token must be a text, got 3",
    ),
    "damaged added tokens": (
        {
            "tokenizer.json": byte_level().to_str(),
            "tokenizer_config.json": '{"added_tokens_decoder": {"7": "x"}}',
        },
        "the added tokens in .* are damaged",
    ),
    "chat templates without names": (
        {
            "tokenizer.json": byte_level().to_str(),
            "tokenizer_config.json": '{"chat_template": [{"template": "x"}]}',
        },
        "a list of entries with name and template",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_in_one_line(fault, tmp_path, monkeypatch):
    no_sentencepiece(monkeypatch)
    files, message = REFUSED[fault]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_sentencepiece_models_cut_as_sentencepiece(pieces, tmp_path):  # noqa: F811
    pytest.importorskip("google.protobuf")
    file, processor = pieces
    (tmp_path / "tokenizer.model").write_bytes(file.read_bytes())
    write(tmp_path, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    tokenizer = read_folder(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *processor.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_damaged_sentencepiece_model_is_refused_in_one_line(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot be read as a SentencePiece model") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "settings", "want"),
    [
        ({}, {"chat_template": "A"}, "A"),
        ({"chat_template.jinja": "F"}, {"chat_template": "A"}, "F"),
        ({}, {"chat_template": [{"name": "default", "template": "A"}]}, "A"),
        (
            {},
            {"chat_template": [{"name": n, "template": n} for n in ("rag", "default")]},
            {"rag": "rag", "default": "default"},
        ),
        (
            {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"},
            {"chat_template": "A"},
            {"default": "F", "rag": "R"},
        ),
        ({}, {"bos_token": "<s>"}, None),
    ],
)
def test_chat_templates(files, settings, want, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_folder(write(tmp_path, byte_level(), **settings)).chat_template == want


def test_an_id_far_beyond_the_others_is_damage(tmp_path):
    """The tokenizers library would count up to it."""
    core = byte_level()
    write(tmp_path, core)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"gives 'zz' the id 2147483648 and has \d+ tokens"):
        read_folder(tmp_path)


@pytest.mark.parametrize("value", ["no", 1, [True]])
def test_flags_are_true_or_false(value, tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": value}
    with pytest.raises(CheckpointError, match="add_bos_token must be true or false, got"):
        read_folder(write(tmp_path, byte_level(), **settings))
    assert read_folder(write(tmp_path, byte_level(), **settings | {"add_bos_token": None}))


def test_ids_of_added_tokens_are_integers(tmp_path):
    size = byte_level().get_vocab_size()
    write(tmp_path, byte_level())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<z>": size + 0.5}))
    with pytest.raises(CheckpointError, match=r"added tokens in .* are damaged"):
        read_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<z>": size}))
    assert read_folder(tmp_path)("<z>")["input_ids"] == [size]


@pytest.mark.parametrize("place", ["single", "pair"])
def test_a_template_of_an_unknown_token_is_damage(place, tmp_path):
    """The tokenizers library would panic at the first text."""
    core = template(byte_level(), "<s> $A")
    write(tmp_path, core)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"][place].append({"SpecialToken": {"id": "<x>", "type_id": 0}})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"post-processor adds '<x>' and does not give its id"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "pieces_of_digits"), [("GPT2Tokenizer", ["123"]), ("Qwen2Tokenizer", ["1", "2", "3"])]
)
def test_vocab_and_merges_are_cut_as_their_class_cuts(name, pieces_of_digits, tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    words = ["12", "123", "Ġt", "he", "Ġthe", "Ã©"]
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    write(tmp_path, tokenizer_class=name)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = ["1 2", "12 3", "Ġ t", "h e", "Ġt he", "Ã ©"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = read_folder(tmp_path)
    assert tokenizer.tokenize("123") == pieces_of_digits
    assert tokenizer.tokenize(" the") == ["Ġthe"]
    # Qwen's tokenizer composes characters; GPT-2's leaves them as they come.
    composed = tokenizer.tokenize("e\u0301") == ["Ã©"]
    assert composed == (name == "Qwen2Tokenizer")
    assert tokenizer.decode(tokenizer("the 123\n")["input_ids"]) == "the 123\n"
