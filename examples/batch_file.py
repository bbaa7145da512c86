"""Answer many prompts from a file in OpenAI's batch format, without a server.

    python examples/batch_file.py MODEL FOLDER

The file of answers grows while the batch runs. Started again, the command answers what is missing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["The capital of France is", "Two and two are", "The opposite of hot is"]


def main() -> None:
    """Write requests, run the batch, print the answers in the order of the requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    requests, answers = args.folder / "requests.jsonl", args.folder / "answers.jsonl"
    lines: list[dict[str, Any]] = [
        {
            "custom_id": f"prompt-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0},
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    command = [sys.executable, "-m", "quatom", "run-batch", requests, answers]
    subprocess.run([*command, "--model", args.model, "--served-model-name", "m"], check=True)

    answered = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        answered[answer["custom_id"]] = answer["response"]["body"]["choices"][0]["text"]
    for request in lines:
        print(f"{request['body']['prompt']!r} -> {answered[request['custom_id']]!r}")


if __name__ == "__main__":
    main()
