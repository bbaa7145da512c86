"""Compare a checkpoint with its floating-point model on tasks of lm-evaluation-harness.

    python examples/evaluate_with_lm_eval.py MODEL CHECKPOINT --limit 100

It needs the `eval` extra. Without --data-dir the data comes from the hub; docs/how-to/evaluate.md
lists the files that --data-dir holds.
"""

import argparse
from pathlib import Path

import quatom


def main() -> None:
    """Run the tasks on both models and print their accuracy side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("checkpoint")
    parser.add_argument("--tasks", default="piqa,arc_easy", help="names, separated by commas")
    parser.add_argument("--data-dir", type=Path, help="folder with TASK/SPLIT.jsonl")
    parser.add_argument("--limit", type=int, help="examples per task; default: all")
    args = parser.parse_args()

    found: dict[tuple[str, str], list[float]] = {}
    for source in (args.model, args.checkpoint):
        loaded = quatom.load(source)
        entries = quatom.evaluate_tasks(
            loaded, args.tasks.split(","), data_dir=args.data_dir, limit=args.limit, progress=False
        )
        for entry in entries:
            found.setdefault((entry["task"], entry["metric"]), []).append(entry["value"])
    print(f"{'task':<15}{'metric':<12}{'float':>8}{'quantized':>12}")
    for (task, metric), (before, after) in found.items():
        print(f"{task:<15}{metric:<12}{before:>8.4f}{after:>12.4f}")


if __name__ == "__main__":
    main()
