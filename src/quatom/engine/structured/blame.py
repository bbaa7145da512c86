"""Which keyword of a schema llguidance refuses, found by compiling its parts alone."""

import json
import time
from collections.abc import Callable
from typing import Any

from quatom.engine.structured.grammar import MAIN, SEPARATORS, Constraint
from quatom.engine.structured.keywords import LIMITS
from quatom.engine.structured.schema import Place, PreparedSchema

SEARCH_SECONDS = 0.5
"""CPU time of one search. Without a result the message names no place."""
STRUCTURE = ("$defs", "definitions", "$schema", "$id", "$anchor")
COMMON = ("type", "properties", "items", "required")
REASONS = {"oneOf": f"it can only be {LIMITS['oneOf']}"}
"""Keyword -> a reason that says more than llguidance's."""

Compile = Callable[[str], str]
"""A grammar's text to llguidance's complaint, empty if there is none."""


def explain(constraint: Constraint, complaint: str, compile_grammar: Compile) -> str:
    """The complaint, and where possible the keyword and the JSON path that it is about."""
    whole = _summary(complaint)
    complaint = whole
    deadline = time.process_time() + SEARCH_SECONDS
    for path, prepared in constraint.schemas.items():
        search = _Search(prepared, compile_grammar, whole, deadline)
        if (found := search.guilty()) is not None:
            place, keyword = found
            complaint = REASONS.get(keyword, complaint)
            where = place.path.replace("$", path, 1) + (keyword and "." + keyword)
            return f"{where}: cannot be enforced: {complaint}"
    return complaint


def _summary(complaint: str) -> str:
    """The first line, without the regular expressions that it may end with."""
    return complaint.strip().partition("\n")[0].partition(":  (")[0][:300]


class _Search:
    def __init__(
        self, prepared: PreparedSchema, compile_grammar: Compile, complaint: str, deadline: float
    ) -> None:
        self._places = prepared.places
        self._compile = compile_grammar
        self._complaint = complaint
        self._deadline = deadline

    def guilty(self) -> tuple[Place, str] | None:
        """The smallest schema that is refused, and the keyword without which it is not."""
        refused = [place for place in self._places if self._refused(place.pointer, set())]
        if not refused:
            return None
        place = max(refused, key=lambda place: len(place.pointer))
        if isinstance(place.schema, dict):
            # A limit is more likely at fault than the names that it limits.
            for name in sorted(place.schema, key=lambda name: name in COMMON):
                if name not in STRUCTURE and not self._refused(place.pointer, {name}):
                    return place, place.written_for.get(name, name)
        return place, ""

    def _refused(self, pointer: str, without: set[str]) -> bool:
        """Whether the schema at `pointer`, less some keywords, has the same fault."""
        root = self._places[0].schema
        if time.process_time() > self._deadline or not _leads_somewhere(root, pointer):
            return False
        target = "#/$defs/document" + pointer[1:]
        document = _moved(root, pointer[1:], without)
        schema = {"$defs": {"document": document}, "$ref": target, "x-guidance": SEPARATORS}
        if "$schema" in root:
            schema["$schema"] = root["$schema"]
        grammars = [{"name": MAIN, "json_schema": schema}]
        found = _summary(self._compile(json.dumps({"grammars": grammars})))
        return bool(found) and self._complaint in (found, "")


def _leads_somewhere(root: Any, pointer: str) -> bool:
    """Whether a place of the document that was given is still there."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and int(key) < len(root):
            root = root[int(key)]
        elif isinstance(root, dict) and key in root:
            root = root[key]
        else:
            return False
    return True


def _moved(node: Any, pointer: str, without: set[str]) -> Any:
    """A copy whose references are those of a document one level deeper.

    Args:
        node: the document, or a value in it.
        pointer: from `node` to the schema that loses keywords.
        without: these keywords.
    """
    if isinstance(node, list):
        return [_moved(item, _step(pointer, str(i)), without) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    moved = {
        key: _moved(value, _step(pointer, key), without)
        for key, value in node.items()
        if not (pointer == "" and key in without) and key != "$schema"
    }
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = "#/$defs/document" + reference[1:]
    return moved


def _step(pointer: str, key: str) -> str:
    """What is left of a pointer after going down to `key`; no pointer: another way was taken."""
    part = "/" + key.replace("~", "~0").replace("/", "~1")
    if pointer == part or pointer.startswith(part + "/"):
        return pointer[len(part) :]
    return "elsewhere"
