"""Options that `quatom bench throughput` and `quatom bench serve` share, and what they mean."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from quatom.benchmark.roofline import Ceilings
    from quatom.benchmark.workloads import Workload

JsonOption = Annotated[
    Path | None, typer.Option(help="Result file; entries of other measurements are kept.")
]
RandomOption = Annotated[
    str | None,
    typer.Option(help="Random weights of this shape instead of MODEL: llama-2-7b, llama-3-8b, ..."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")
]
ConversationsOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of [input, output] lengths, instead of fixed ones."),
]
Number = TypeVar("Number", int, float)


def make_workload(
    conversations: Path | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
    longest: int,
    seed: int,
) -> "Workload":
    """Fixed lengths, or conversations from a file."""
    from quatom.benchmark.workloads import fixed_lengths, read_conversations

    if conversations is not None:
        return read_conversations(conversations, num_prompts, longest=longest, seed=seed)
    return fixed_lengths(num_prompts, input_len, output_len)


def default_device() -> str:
    """A GPU if torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_ceilings(text: str | None, device: str) -> "tuple[Ceilings | None, dict[str, float]]":
    """Ceilings given or measured, and as a result file stores them; none on a CPU."""
    from quatom.benchmark.environment import measure_ceilings
    from quatom.benchmark.roofline import Ceilings
    from quatom.engine.startup import release_memory

    if text is not None:
        parts = text.split(",")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if len(values) != 3 or min(values) <= 0:
            raise typer.BadParameter(
                f"{text!r} is not three positive numbers: TB/s, BF16 TFLOPS, 8-bit TFLOPS",
                param_hint="--ceilings",
            )
        measured = dict(zip(("copy_tb_s", "bf16_tflops", "fp8_tflops"), values, strict=True))
    elif device.startswith("cuda"):
        measured = measure_ceilings()
        release_memory()
    else:
        return None, {}
    return Ceilings.from_environment(measured), measured


def read_batches(text: str) -> list[int | None]:
    """Batch sizes; None for "max"."""
    try:
        batches = [None if part == "max" else int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if any(batch is not None and batch < 1 for batch in batches):
        raise typer.BadParameter(
            f"{text!r} is not a list of positive numbers or max, such as 1,8,32,max",
            param_hint="--batch",
        )
    return batches


def read_numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """Positive numbers of a comma-separated list; none where the option was not given."""
    try:
        values = [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        values = [kind("0")]
    if any(value <= 0 for value in values):
        raise typer.BadParameter(
            f"{text!r} is not a list of positive numbers, such as 1,8", param_hint=option
        )
    return values
