"""`quatom`: the command line. Each command is a module that imports torch when it runs."""

import logging
import signal
import sys

import typer

from quatom.errors import OtherProcessError, QuatomError
from quatom.extras import how_to_install
from quatom.version import __version__

app = typer.Typer(
    name="quatom",
    help="Low-bit quantization and serving of language models, an implementation of Atom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quatom {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_show_version, is_eager=True
    ),
) -> None:
    pass


def _register() -> None:
    from quatom.cli.ablate import ablate
    from quatom.cli.agree import agree
    from quatom.cli.bench import app as bench
    from quatom.cli.doctor import doctor
    from quatom.cli.evaluate import evaluate
    from quatom.cli.export import export
    from quatom.cli.generate import generate
    from quatom.cli.import_checkpoint import import_checkpoint
    from quatom.cli.inspect import inspect
    from quatom.cli.plan import plan
    from quatom.cli.quantize import quantize
    from quatom.cli.recipes import recipes
    from quatom.cli.report import report
    from quatom.cli.run_batch import run_batch
    from quatom.cli.search import search
    from quatom.cli.serve import serve
    from quatom.cli.steps import steps
    from quatom.cli.warmup import warmup

    app.command("quantize")(quantize)
    app.command("recipes")(recipes)
    app.command("search")(search)
    app.command("plan")(plan)
    app.command("eval")(evaluate)
    app.command("ablate")(ablate)
    app.command("agree")(agree)
    app.command("export")(export)
    app.command("import")(import_checkpoint)
    app.command("generate")(generate)
    app.command("inspect")(inspect)
    app.command("doctor")(doctor)
    app.command("report")(report)
    app.command("serve")(serve)
    app.command("warmup")(warmup)
    app.command("run-batch")(run_batch)
    bench.command("steps")(steps)
    app.add_typer(bench, name="bench")


_register()


class _OneLine(logging.Formatter):
    """Messages hold names from files, which may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return f"quatom: {_on_one_line(record.getMessage())}"


def _show_log() -> None:
    """Show on stderr what a user should know: kernels being compiled, files passed over.

    A server replaces this by its JSON logs.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.getLogger("quatom").handlers = [handler]
    for part in ("quatom.ops", "quatom.quantize"):
        logging.getLogger(part).setLevel(logging.INFO)


def _on_one_line(text: str) -> str:
    """A text with escapes for what breaks a line or a terminal: file names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def main() -> None:
    """Run the command line: exit status 0 done, 1 failed with one line on stderr, 2 usage."""
    _show_log()
    try:
        app()
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # Typer makes this of a KeyboardInterrupt
            print("quatom: interrupted", file=sys.stderr)
        raise
    except OtherProcessError:
        sys.exit(1)  # the process that failed says why
    except (QuatomError, OSError) as error:  # files that --json and --plot name among them
        print(f"quatom: {_on_one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        remedy = how_to_install(error.name)
        if remedy is None:
            raise
        print(f"quatom: {remedy}", file=sys.stderr)
        sys.exit(1)
