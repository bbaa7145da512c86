"""Invented examples of every zero-shot task, in the published files' own fields."""

import json
from pathlib import Path

ROWS = {
    "piqa/validation.jsonl": [
        {"goal": "How to cool soup", "sol1": "Blow on it", "sol2": "Boil it longer", "label": 0},
        {"goal": "Dry a cup", "sol1": "Fill it with tea", "sol2": "Use a towel", "label": 1},
        {"goal": "Fix a squeaky hinge", "sol1": "Oil it", "sol2": "Paint it red", "label": 0},
    ],
    "arc_easy/test.jsonl": [
        {
            "id": "a",
            "question": "Which of these is hot?",
            "choices": ["ice", "a fire", "snow", "the deep sea"],
            "gold": 1,
        },
        {
            "id": "b",
            "question": "What do plants need?",
            "choices": {"text": ["light", "salt", "smoke"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
    ],
    "arc_challenge/test.jsonl": [
        {
            "id": "c",
            "question": "Why does a lake freeze from above?",
            "choices": ["Ice is lighter", "Fish are warm", "Wind is cold", "Mud is deep"],
            "gold": 0,
        },
        {
            "id": "d",
            "question": "What makes day and night?",
            "choices": ["The Moon", "The Earth turns", "Clouds", "Tides", "Birds"],
            "gold": 1,
        },
    ],
    "boolq/validation.jsonl": [
        {"question": "is glass a liquid", "answer": False, "passage": "Glass is a solid."},
        {"question": "is snow cold", "answer": True, "passage": "Snow is frozen water. " * 6},
        {"question": "do cats swim", "answer": True, "passage": "Cats can swim, and dislike it."},
    ],
    "hellaswag/validation.jsonl": [
        {
            "ind": 1,
            "activity_label": "Baking bread",
            "ctx_a": "A woman kneads dough [title] on a table.",
            "ctx_b": "she",
            "endings": ["puts it in an oven.", "sails away.", "[step] reads it.", "melts  down."],
            "label": "0",
        },
        {
            "ind": 2,
            "activity_label": "Juggling",
            "ctx_a": "Three balls fly.",
            "ctx_b": "",
            "endings": ["They sing.", "One falls.", "It rains.", "He eats them."],
            "label": "1",
        },
    ],
    "winogrande/xl_validation.jsonl": [
        {
            "sentence": "The jug did not fit the box because the _ was small.",
            "option1": "jug",
            "option2": "box",
            "answer": "2",
        },
        {
            "sentence": "Ann thanked Eve for the help that _ had given.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
    ],
    "lambada_openai/test.jsonl": [
        {"text": "He opened the door and closed the door", "context": "unused", "target": "door"},
        {"text": '"No, Tom," she said. "Never again, Tom', "context": "unused"},
    ],
    "gsm8k/test.jsonl": [
        {"question": "Two and two apples?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "Half of ten?", "answer": "#### 5"},
    ],
    "gsm8k/train.jsonl": [
        {"question": f"One and {n}?", "answer": f"#### {n + 1}"} for n in range(6)
    ],
}


def write_task_rows(folder: Path) -> Path:
    """A data folder with a few rows of all tasks."""
    for name, rows in ROWS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
