"""What several commands share: reading options, progress bars and tables."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quatom.errors import CheckpointError
from quatom.recipe import Recipe
from quatom.recipe_file import differences, find_recipe

if TYPE_CHECKING:
    from quatom.quantize.walk import QuantizedBlock


def read_recipe(name: str, **calibration: int | None) -> Recipe:
    """A preset by name or a recipe from a JSON file, calibration fields overridden if given.

    Raises:
        RecipeError: there is no such preset or file, or the file is not a recipe.
    """
    recipe, _ = find_recipe(name)
    given = {key: value for key, value in calibration.items() if value is not None}
    return replace(recipe, calibration=replace(recipe.calibration, **given))


def check_output(file: Path | None) -> None:
    """Raise CheckpointError if a file that is written at the end of the work cannot be."""
    if file is None:
        return
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder: give the name of a file")
    if not file.parent.is_dir():
        raise CheckpointError(f"{file} cannot be written: {file.parent} is no folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CheckpointError(f"{file} cannot be written: give another file")


class _Bar:
    """A progress bar on stderr, on a terminal only. It appears at its first `show`."""

    def __init__(self, title: str, columns: str = "", hidden: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._title, self._console = title, Console(stderr=True)
        self._shown = self._console.is_terminal and not hidden
        self._progress = Progress(  # narrow enough for 80 columns, the title is a line of its own
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left" + columns),
            console=self._console,
            disable=not self._shown,
        )
        self._task = self._progress.add_task("", total=None, start=False, last="")

    def show(self, done: int, total: int, last: str = "") -> None:
        """Say how much is done, and in `last` what the last step gave."""
        if not self._progress.tasks[0].started and self._shown:
            self._console.print(self._title, markup=False, emoji=False, highlight=False)
            self._progress.start()
            self._progress.start_task(self._task)
        self._progress.update(self._task, total=total, completed=done, last=last)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


@contextmanager
def _bar(title: str, columns: str = "", hidden: bool = False) -> Iterator[_Bar]:
    bar = _Bar(title, columns, hidden)
    try:
        yield bar
    finally:
        bar.stop()


@contextmanager
def block_progress(
    title: str, *, hidden: bool = False
) -> Iterator[tuple[Callable[[int, int], None], Callable[["QuantizedBlock"], None]]]:
    """A bar over decoder blocks, with seconds and output error of the last one.

    Args:
        title: of the bar.
        hidden: show nothing: another process does.

    Yields:
        What to call with blocks done and in all before the first one, and after each block.
    """
    with _bar(title, "{task.fields[last]}", hidden) as bar:

        def on_block(block: "QuantizedBlock") -> None:
            error = block.relative_error
            last = f", last: {block.seconds:.1f} s"
            last += "" if error is None else f", output error {error:.3f}"
            bar.show(block.index + 1, block.num_blocks, last)

        yield bar.show, on_block


@contextmanager
def rung_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over decoder blocks."""
    with _bar(title) as bar:
        yield bar.show


@contextmanager
def window_progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over evaluation windows with the perplexity so far."""
    with _bar(title, "{task.fields[last]}") as bar:
        yield lambda done, total, perplexity: bar.show(
            done, total, f", perplexity {perplexity:.3f}"
        )


def print_recipe(recipe: Recipe, base: Recipe) -> None:
    """The fields in which a recipe differs from its base."""
    start = "the defaults of the fields" if base == Recipe() else f"the preset {base.name}"
    changed = differences(recipe, base)
    if not changed:
        print(f"{recipe.name} is {start}")
        return
    rows = [(name, str(before), str(value)) for name, (before, value) in changed.items()]
    title = f"Recipe {recipe.name}: what differs from {start}"
    column = "default" if base == Recipe() else "preset"
    print_table(title, ("field", column, "used"), rows, text=True)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False
) -> None:
    """A table on the terminal; numbers, that is all columns but the first, to the right.

    With `text` they are words, and stay on the left.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for position, name in enumerate(header):
        table.add_column(
            name, justify="right" if position and not text else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    # Square brackets in a cell are text, as in pip install 'quatom[eval]'.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(title, soft_wrap=True)  # rich would break it at the width of the table
    console.print(table)


def default_name(model: str) -> str:
    """The name a model is served under: its path or hub id as given, without a closing slash."""
    return str(Path(model)) if Path(model).exists() else model
