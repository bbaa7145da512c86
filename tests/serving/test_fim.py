"""`suffix` of /v1/completions: prompts that ask for the text in the middle."""

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from quatom.errors import RequestError
from quatom.serving.fim import FAMILIES, FillInTheMiddle
from quatom.serving.text_encoder import TextEncoder
from tests.serving.scripted import scripted_server, scripted_tokenizer


@pytest.mark.parametrize("tokens", FAMILIES, ids=lambda tokens: tokens.family)
def test_prompts_of_every_family(tokens):
    special = [tokens.before, tokens.after, tokens.middle]
    tokenizer = scripted_tokenizer(None, special)
    fim = FillInTheMiddle(tokenizer, TextEncoder(tokenizer))
    text = f"{tokens.before}def f(x):\n    {tokens.after}\n    return x{tokens.middle}"
    assert tokenizer.decode(fim.encode("def f(x):\n    ", "\n    return x", special=True)) == text
    assert fim.encode(list(b"ab"), "c", special=False)[1:3] == list(b"ab")
    assert fim.stop_token_ids() == []
    tokenizer = scripted_tokenizer(None, [*special, *tokens.ends])
    with_ends = FillInTheMiddle(tokenizer, TextEncoder(tokenizer))
    assert len(with_ends.stop_token_ids()) == len(tokens.ends)


def llama_like():
    """CodeLlama's tokenizer in miniature: texts begin with a space, and with <s>."""
    words = ["<unk>", "<s>", "▁", "▁a", "a", "b", "▁b", "\u263a", "▁\u263a"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("▁", "\u263a")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    core.add_special_tokens(["<s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_what_follows_the_middle_begins_no_word():
    tokenizer = llama_like()
    fim = FillInTheMiddle(tokenizer, TextEncoder(tokenizer))
    made = tokenizer.convert_ids_to_tokens(fim.encode("a", "b a", special=True))
    assert made == ["<s>", "▁<PRE>", "▁a", "▁<SUF>", "b", "▁a", "▁<MID>"]
    assert tokenizer.convert_ids_to_tokens(fim.encode("a", "b", special=False))[0] == "▁<PRE>"
    assert tokenizer.convert_ids_to_tokens(fim.stop_token_ids()) == ["▁<EOT>"]


def test_tokenizers_without_the_tokens_are_refused():
    tokenizer = scripted_tokenizer(None)
    with pytest.raises(RequestError, match=r"searched for <\|fim_prefix\|> \(Qwen2.5-Coder\)"):
        FillInTheMiddle(tokenizer, TextEncoder(tokenizer)).encode("a", "b", special=True)


def test_over_http():
    special = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"]
    answer = "x + 1<file_sep>other file"
    with scripted_server(None, answer, special=special, begin="<fim_middle>") as server:  # noqa: SIM117
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            ask = {"model": "hash", "prompt": "y = ", "suffix": "\nprint(y)", "temperature": 0}
            made = client.completions.create(**ask)
            assert made.choices[0].text == "x + 1"
            assert made.choices[0].finish_reason == "stop"
            assert server.model.prompts == ["<fim_prefix>y = <fim_suffix>\nprint(y)<fim_middle>"]
            chunks = client.completions.create(**ask, stream=True)
            assert "".join(c.choices[0].text for c in chunks) == "x + 1"
            with pytest.raises(openai.BadRequestError, match="suffix excludes echo"):
                client.completions.create(**ask, echo=True)


def test_models_without_the_tokens_answer_400(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="no tokens to fill in the middle"):
            client.completions.create(model="hash", prompt="a", suffix="b")
        made = client.completions.create(model="hash", prompt="a", suffix="", max_tokens=1)
        assert made.usage.completion_tokens == 1
