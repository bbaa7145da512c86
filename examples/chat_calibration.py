"""Calibrate a chat model on conversations: they go through the model's own chat template.

    python examples/chat_calibration.py MODEL TARGET

Replace CONVERSATIONS with some hundred of your own: the default needs 128 sequences of 2048 tokens.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import quatom

CONVERSATIONS = [
    [
        {"role": "user", "content": f"What is {a} times {b}?"},
        {"role": "assistant", "content": f"{a} times {b} is {a * b}."},
    ]
    for a in range(2, 20)
    for b in range(2, 20)
]


def main() -> None:
    """Write the calibration set, quantize with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("target", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    args = parser.parse_args()

    chats = args.target.with_suffix(".jsonl")
    lines = (json.dumps({"messages": messages}) for messages in CONVERSATIONS)
    chats.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    preset = quatom.PRESETS["quatom-w4a8kv4"]
    calibration = replace(preset.calibration, num_samples=args.samples, sequence_length=args.length)
    report = quatom.quantize_checkpoint(
        args.model, args.target, replace(preset, calibration=calibration), calibration=chats
    )
    print(f"{report.target}: {report.bits_per_weight:.2f} bits per weight")


if __name__ == "__main__":
    main()
