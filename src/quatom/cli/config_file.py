"""`--config FILE`: options of a command from a YAML or TOML file, under their own names.

Values become the command's defaults, so the command line wins, and each is checked as if it had
been typed: a file can say nothing that the command line could not.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from quatom.errors import ServerError


def apply_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of an eager option `--config`.

    Raises:
        ServerError: the file cannot be read, or holds what is no option of this command.
    """
    if path is not None and not context.resilient_parsing:
        parameters = {p.name: p for p in context.command.params if p.name != "config"}
        values = {}
        for key, value in _read(path).items():
            name = str(key).replace("-", "_")
            if name not in parameters or name == "help":
                near = difflib.get_close_matches(name, parameters, n=1)
                hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
                raise ServerError(f"{path}: {key!r} is no option of this command{hint}")
            if name in values:
                raise ServerError(f"{path}: {key!r} is given twice")
            values[name] = _as_typed(value, parameters[name].multiple, f"{path}: {key}")
        context.default_map = {**(context.default_map or {}), **values}
    return path


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix:
            case ".toml":
                content = tomllib.loads(text)
            case ".yaml" | ".yml":
                content = _read_yaml(text)
            case _:
                raise ServerError(f"{path}: --config takes a .yaml, .yml or .toml file")
    except OSError as error:
        raise ServerError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ServerError(f"{path} must hold option names and values, one on each line")
    return content


def _read_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML allows a key twice and keeps the last value; here that is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise ValueError(f"{twice[0]!r} is given twice")
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _as_typed(value: Any, multiple: bool, where: str) -> str | list[str]:
    """A value as words of a command line, which the option's own type then reads."""
    if isinstance(value, list) and multiple:
        return [_word(item, where) for item in value]
    word = _word(value, where)
    return [word] if multiple else word


def _word(value: Any, where: str) -> str:
    if not isinstance(value, str | int | float):
        kind = "no value" if value is None else f"a {type(value).__name__}"
        raise ServerError(f"{where} has {kind}; it takes a text, a number, true or false")
    return str(value)
