"""What can be checked of the commands and code blocks of a page without running them."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path

import typer
import typer.main
import yaml

import quatom
from quatom.cli.main import app
from quatom.recipe_file import recipe_from

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {
    "--attention-backend",
    "--enable-auto-tool-choice", "--init", "--kv-cache-dtype",
    "--kv-cache-dtype-skip-layers", "--model_args", "--nnodes", "--reasoning-parser",
    "--tool-call-parser",
}  # fmt: skip
"""Options of docker, vLLM, torchrun and lm-evaluation-harness that pages name."""


def _command(words):
    command, found = typer.main.get_command(app), []
    for word in words:
        if not hasattr(command, "commands") or word not in command.commands:
            break
        command, found = command.commands[word], [*found, word]
    return command, found


def _options_of(command):
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def _all_options(command):
    inner = getattr(command, "commands", {}).values()
    return _options_of(command).union(*(_all_options(one) for one in inner))


OPTIONS = _all_options(typer.main.get_command(app)) | OTHERS


def parse(words):
    """Parse a command line with the real options, and run nothing.

    Raises:
        an error of typer: it is not one.
    """
    command = typer.main.get_command(app)
    context = command.make_context("quatom", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, list(rest), parent=context)


def fenced(text, *languages):
    """Contents of the code blocks in one of these languages, in lists too."""
    pattern = rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```"
    return [match[1] for match in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


def shell_lines(text):
    """Lines of shell blocks and of indented blocks, continuation lines joined."""
    blocks = fenced(text, "bash", "console", "sh", "")
    rest = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^    .+\n?)+", rest, re.M)
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]


def commands_of(text):
    """Every `quatom ...` command line of a page's code blocks."""
    found = []
    for line in shell_lines(text):
        line = re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?=quatom )", "", line)
        if line.startswith("quatom ") and "[OPTIONS]" not in line:
            words = shlex.split(line.split(" > ")[0].split(" | ")[0], comments=True)
            found.append([word for word in words[1:] if word != "&"])
    return found


def problems(text):
    """What is wrong with the commands, options and code blocks of a page, a line each."""
    # The generated reference quotes options of its own, and is compared with the code elsewhere.
    text = re.sub(r"<!-- table commands -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    return [
        *_commands(text),
        *_mentions(text),
        *_extras(text),
        *_targets_and_files(text),
        *_python(text),
        *_data(text),
        *_requests(text),
    ]


def _commands(text):
    for words in commands_of(text):
        try:
            with suppress(typer.Exit):  # --help and --version
                parse(words)
        except Exception as error:  # typer's errors have no common class
            yield f"quatom {' '.join(words)}: {error}"


def _mentions(text):
    """Commands inside sentences may be incomplete; what is there must exist."""
    for quoted in re.findall(r"`quatom ([a-z][^`]*)`", text):
        words = quoted.split()
        command, found = _command(words)
        if not found:
            yield f"`quatom {quoted}`: no such command"
            continue
        known = _options_of(command)
        wrong = [w for w in words if w.startswith("--") and w.split("=")[0] not in known]
        if wrong:
            yield f"`quatom {quoted}`: no option {', '.join(wrong)}"
    for option in re.findall(r"`(--[\w-]+)[^`]*`", text):
        if option not in OPTIONS:
            yield f"`{option}` is an option of no command"


def _extras(text):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r"(?:quatom|'\.)\[([\w,-]+)\]'", text):
        for name in names.split(","):
            if name not in project["optional-dependencies"]:
                yield f"no extra {name}"


def _targets_and_files(text):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in re.findall(r"(?:`|^ +)make ([a-z][\w-]*)", text, re.M):
        if target not in targets:
            yield f"make {target}: no such target"
    for module in re.findall(r"python -m ([\w.]+)", text):
        if importlib.util.find_spec(module) is None:
            yield f"python -m {module}: no such module"
    for file in re.findall(r"(?:python |sh |`|-f )((?:scripts|examples|deploy)/[\w./-]+)", text):
        if not (ROOT / file).exists():
            yield f"{file}: no such file"


def _python(text):
    for block in fenced(text, "python"):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            if not block.startswith(" "):  # the middle of a function
                yield f"{block.splitlines()[0]} ...: {error}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for name in names or [node.module]:
                    if importlib.util.find_spec(name) is None:
                        yield f"import {name}: no such module"
            elif (
                isinstance(node, ast.Attribute)
                and getattr(node.value, "id", "") == "quatom"
                and node.attr not in (*quatom.__all__, "integrations")
            ):
                yield f"quatom.{node.attr} is not public"


def _data(text):
    for block in fenced(text, "json"):
        if "..." in block or not block.startswith("{"):  # shortened
            continue
        try:
            data = json.loads(block)
            if "base" in data:
                recipe_from(data)
        except Exception as error:
            yield f"{block.splitlines()[0]} ...: {error}"
    for block in fenced(text, "yaml"):
        known = _options_of(_command(["serve"])[0])
        for name in yaml.safe_load(block):
            if name != "model" and f"--{name}" not in known:
                yield f"{name}: no option of quatom serve"


def _requests(text):
    served = "\n".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "src/quatom/serving").glob("*.py")
    )
    for address, body in re.findall(r"curl \S*?:8000(\S+) [^`]*?-d '(.*?)'\n", text, re.DOTALL):
        if f'"{address}"' not in served:
            yield f"{address}: no such endpoint"
        try:
            json.loads(body)
        except ValueError as error:
            yield f"{body}: {error}"
