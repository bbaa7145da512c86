"""What several commands share: reading options, progress bars and tables."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quatom.errors import RecipeError
from quatom.recipe import Recipe
from quatom.recipe_file import differences, find_recipe

if TYPE_CHECKING:
    import torch

    from quatom.quantize.walk import QuantizedBlock


def read_recipe(name: str, **calibration: int | None) -> Recipe:
    """A preset by name or a recipe from a JSON file, calibration fields overridden if given.

    Raises:
        RecipeError: there is no such preset or file, or the file is not a recipe.
    """
    recipe, _ = find_recipe(name)
    given = {key: value for key, value in calibration.items() if value is not None}
    return replace(recipe, calibration=replace(recipe.calibration, **given))


def read_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype called `name`.

    Raises:
        RecipeError: it is none that models compute in.
    """
    import torch

    allowed = ("float32", "bfloat16", "float16")
    if name is None:
        return None
    if name not in allowed:
        raise RecipeError(f"--dtype must be one of {', '.join(allowed)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def _progress(columns: str) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        TextColumn(columns),
    ) as progress:
        yield progress


@contextmanager
def block_progress(title: str) -> Iterator[Callable[["QuantizedBlock"], None]]:
    """A bar over decoder blocks, with seconds and output error of the last one."""
    with _progress("{task.fields[error]}") as progress:
        task = progress.add_task(title, total=None, error="")

        def on_block(block: "QuantizedBlock") -> None:
            error, seconds = block.relative_error, f"{block.seconds:.1f} s for the last"
            progress.update(
                task,
                total=block.num_blocks,
                completed=block.index + 1,
                error=seconds if error is None else f"{seconds}, output error {error:.3f}",
            )

        yield on_block


@contextmanager
def rung_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over decoder blocks."""
    with _progress("") as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, total=total, completed=done)


@contextmanager
def window_progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over evaluation windows with the perplexity so far."""
    with _progress("perplexity {task.fields[perplexity]}") as progress:
        task = progress.add_task(title, total=None, perplexity="...")

        def on_window(done: int, total: int, perplexity: float) -> None:
            progress.update(task, total=total, completed=done, perplexity=f"{perplexity:.3f}")

        yield on_window


def print_recipe(recipe: Recipe, base: Recipe) -> None:
    """The fields in which a recipe differs from its base."""
    start = "the defaults of the fields" if base == Recipe() else base.name
    changed = differences(recipe, base)
    if not changed:
        print(f"{recipe.name} is {start}")
        return
    rows = [(name, str(before), str(value)) for name, (before, value) in changed.items()]
    print_table(f"{recipe.name} = {start}, but", ("field", "instead of", "is"), rows, text=True)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False
) -> None:
    """A table on the terminal; numbers, that is all columns but the first, to the right.

    With `text` they are words, and stay on the left.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(
            name, justify="right" if position and not text else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    Console().print(table)
