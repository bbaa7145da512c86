"""A number in a long text, asked for at its end: what a quantized cache keeps over a distance.

The text is sentences of a small grammar, drawn by a fixed seed, with the sentence of the number at
one of several depths. An example is right if greedy decoding gives all digits. Lengths are those of
texts in tokens, roughly: a sentence has 10 with the tokenizers of today's models.

The idea is that of passkey retrieval (Mohtashami & Jaggi, Landmark Attention, NeurIPS 2023).
"""

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

LENGTHS = {f"passkey_{count}k": 1000 * count for count in (1, 2, 4, 8, 16, 32)}
"""Tokens of a text by the name of its task. Texts are a tenth shorter, to leave room."""
DEPTHS = 10
"""Places of the number, from the beginning of the text to its end."""
NUMBERS = 10
"""Examples of each place."""

_TOKENS = 10
"""Of a sentence, at most."""
_WHO = ("gardener", "driver", "teacher", "child", "painter", "guest", "baker", "doctor")
_DID = ("carried", "looked at", "bought", "forgot", "cleaned", "painted", "hid", "found")
_WHAT = ("lamp", "basket", "chair", "coat", "letter", "bicycle", "mirror", "kettle")
_WHERE = ("house", "station", "garden", "market", "bridge", "school", "river", "shop")


def passkey_rows(task: str) -> list[Row]:
    """All examples of a task of `LENGTHS`: `text` up to the number, and `key`, its five digits."""
    draw = random.Random(0)
    count = int(0.9 * LENGTHS[task]) // _TOKENS
    rows = []
    for depth in range(DEPTHS):
        for _ in range(NUMBERS):
            key = str(draw.randint(10000, 99999))
            sentences = [_sentence(draw) for _ in range(count)]
            place = round(depth * (count - 1) / (DEPTHS - 1))
            sentences[place] = f"The number of the locker is {key}."
            text = " ".join([*sentences, "The number of the locker is"])
            rows.append({"text": text, "key": key})
    return rows


def passkey_task(task: str, dataset: Callable[..., Any]) -> dict[str, Any]:
    """Definition for lm-evaluation-harness; `dataset` gives the rows as its split `test`."""
    return {
        "task": task,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        # The harness puts its target_delimiter before choices alone.
        "doc_to_target": "{{' ' + key}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _sentence(draw: random.Random) -> str:
    who, did, what, where = (draw.choice(words) for words in (_WHO, _DID, _WHAT, _WHERE))
    return f"The {who} {did} the {what} near the {where}."
