"""Passkeys: where the number stands, how long texts are, and what counts as found."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval' (pip install 'quatom[eval]')")

from quatom.evaluation.harness_tasks import load_tasks, quiet
from quatom.evaluation.passkey import DEPTHS, LENGTHS, NUMBERS, passkey_rows
from quatom.evaluation.zero_shot import evaluate_tasks
from quatom.loading import load
from tests.conftest import LLAMA, make_model, write_byte_tokenizer


def test_the_number_stands_once_at_every_depth():
    rows = passkey_rows("passkey_1k")
    assert rows == passkey_rows("passkey_1k")
    assert len({row["key"] for row in rows}) == len(rows) == DEPTHS * NUMBERS
    places = []
    for row in rows:
        sentences = row["text"].split(". ")
        assert row["text"].count(row["key"]) == 1
        places.append(sentences.index(f"The number of the locker is {row['key']}"))
        assert sentences[-1] == "The number of the locker is"
    assert places == sorted(places)
    assert sorted(set(places)) == [round(d * 89 / 9) for d in range(10)]  # of 90 sentences


@pytest.mark.parametrize("task", LENGTHS)
def test_texts_are_a_tenth_shorter_than_they_are_called(task):
    """A word and the dot of a sentence are a token each; digits may be one each, too."""
    words = [len(row["text"].split()) + row["text"].count(".") + 5 for row in passkey_rows(task)]
    assert max(words) <= 0.95 * LENGTHS[task]
    assert min(words) > 0.8 * LENGTHS[task]


class Reader:
    """What the harness asks of a model; it finds numbers in the first `seen` words."""

    rank, world_size, tokenizer_name = 0, 1, "words"

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def loglikelihood(self, requests):
        answers = []
        for text, continuation in (request.args for request in requests):
            # As the number stands in the text: joined to a word it would be other tokens.
            assert continuation.startswith(" ")
            read = text.split()[: self.seen]
            answers.append((-1.0, f"{continuation.strip()}." in read))
        return answers


@pytest.mark.parametrize(("seen", "share"), [(10**6, 1.0), (400, 0.5)])
def test_a_model_is_right_where_it_finds_the_number(seen, share):
    from lm_eval.evaluator import evaluate

    tasks = load_tasks(["passkey_1k"])
    with quiet():
        found = evaluate(
            Reader(seen), {"tasks": tasks, "groups": {}}, bootstrap_iters=0, log_samples=False
        )
    # Of 90 sentences of 8 or 9 words 400 words are some 48: places 0, 10, 20, 30, 40 are read.
    assert found["results"]["passkey_1k"]["acc,none"] == share


def test_a_random_model_finds_nothing(tmp_path):
    folder = make_model(tmp_path / "long", LLAMA | {"max_position_embeddings": 8192})
    write_byte_tokenizer(folder)
    (entry,) = evaluate_tasks(load(folder), ["passkey_1k"], limit=2, progress=False)
    assert (entry["metric"], entry["examples"], entry["value"]) == ("acc", 2, 0.0)
    assert entry["num_fewshot"] == 0
