"""JSON schemas: what is generated is valid, and what cannot be enforced is refused by its name."""

import json
import re
from pathlib import Path

import pytest

from quatom.engine.structured import keywords
from quatom.errors import RequestError
from tests.conftest import SHARED_DATA
from tests.engine.constrained import compile_here

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

SUITE = SHARED_DATA / "json_schema_suite" / "tests"


def complaints(schema, text):
    """Why a text is no instance of a schema; formats count."""
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    checker = validator.FORMAT_CHECKER
    instance = json.loads(text)
    return [
        error.message for error in validator(schema, format_checker=checker).iter_errors(instance)
    ]


def assert_sound(schema, count=20, *, least=1):
    texts = compile_here("json_schema", schema).texts(count)
    assert len(texts) >= least, "no text ended"
    for text in texts:
        assert not complaints(schema, text), text
    return texts


def names_in(schema):
    """Every key of a schema at any depth."""
    if isinstance(schema, list):
        return set().union(*map(names_in, schema), set())
    if isinstance(schema, dict):
        return schema.keys() | set().union(*map(names_in, schema.values()), set())
    return set()


def suite_files():
    return sorted(SUITE.rglob("*.json")) if SUITE.exists() else []


@pytest.mark.skipif(not SUITE.exists(), reason="the JSON-Schema-Test-Suite is not on this machine")
@pytest.mark.parametrize("path", suite_files(), ids=lambda p: p.stem)
def test_the_public_suite(path):
    for case in json.loads(path.read_text()):
        schema = case["schema"]
        try:
            constraint = compile_here("json_schema", schema)
        except RequestError as error:
            message = str(error)
            if schema is not False and "allows no text at all" not in message:
                path = re.search(r"(\$.*?): ", message)
                assert path, message
                assert any(name in path[1] for name in names_in(schema)), message
            continue
        texts = [constraint.draw(seed, 200) for seed in range(6)]
        for text in texts:
            if text is not None:
                assert not complaints(schema, text.decode()), (case["description"], text)


SOUND = {
    "required beside properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["x", "a"],
        "additionalProperties": {"enum": [1, 2]},
    },
    "pattern and lengths": {
        "type": "string",
        "pattern": '^[ab\n"]+',
        "minLength": 3,
        "maxLength": 5,
    },
    "a pattern that is found": {"type": "string", "pattern": "^a|b$", "maxLength": 5},
    "const in every type": {"enum": [None, True, 'a"\\\u0000\u2028', 2**63 - 1, 0.1, {"b": [{}]}]},
    "bounds": {"type": "number", "exclusiveMinimum": 0.1, "maximum": 1},
    "whole bounds": {"type": "integer", "minimum": -3, "exclusiveMaximum": 4.0},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 50, "maximum": 500},
    "no repeated name for one": {
        "type": "object",
        "additionalProperties": {"type": "null"},
        "minProperties": 1,
        "maxProperties": 2,
    },
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "null"}],
        "items": {"type": "boolean"},
        "minItems": 2,
        "maxItems": 4.0,
    },
    "patterns of names": {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "null"}},
        "additionalProperties": False,
    },
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/tree"}, "value": {"type": "integer"}},
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "alternatives told apart by a property": {
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            kind: {
                "type": "object",
                "properties": {"kind": {"const": kind}, "x": {"type": "integer"}},
                "required": ["kind"],
            }
            for kind in "AB"
        },
    },
    "an older draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}],
        "additionalItems": {"type": "null"},
    },
    "the oldest draft": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "maximum": 5,
    },
    "annotations": {
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [1],
        "type": "boolean",
        "deprecated": True,
        "readOnly": True,
        "writeOnly": False,
        "$comment": "c",
    },
    "unique items are not asked for": {
        "type": "array",
        "items": {"enum": [1]},
        "uniqueItems": False,
    },
}


@pytest.mark.parametrize("name", SOUND)
def test_answers_are_valid(name):
    assert_sound(SOUND[name])


@pytest.mark.parametrize("name", sorted(keywords.FORMATS))
def test_formats(name):
    assert_sound({"type": "string", "format": name}, count=60)


def test_dates_exist():
    date = compile_here("json_schema", {"format": "date", "type": "string"})
    for text, exists in {
        "2024-02-29": True,
        "2023-02-29": False,
        "1900-02-29": False,
        "2000-02-29": True,
        "2023-02-30": False,
        "2023-04-31": False,
        "0000-01-01": False,
        "0001-12-31": True,
    }.items():
        assert date.accepts(json.dumps(text)) is exists, text
    time = compile_here("json_schema", {"format": "time", "type": "string"})
    assert time.accepts('"23:59:59Z"')
    assert not time.accepts('"23:59:60Z"')


REFUSED = {
    "$.uniqueItems": {"type": "array", "uniqueItems": True},
    "$.not": {"not": {"type": "null"}},
    "$.contains": {"contains": {"type": "null"}},
    "$.if": {"if": {"type": "null"}, "then": {"const": 1}},
    "$.dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "$.dependentSchemas": {"dependentSchemas": {"a": {}}},
    "$.propertyNames": {"propertyNames": {"maxLength": 3}},
    "$.unevaluatedProperties": {"unevaluatedProperties": False},
    "$.unevaluatedItems": {"unevaluatedItems": False},
    "$.$dynamicRef": {"$dynamicRef": "#a"},
    "$.contentEncoding": {"contentEncoding": "base64"},
    "$.anyOf": {"anyOf": []},
    "$.enum": {"enum": []},
    "$.const": {"const": 123456789012345678901234567890},
    "$.enum: the number 1.5e+300": {"enum": [1, 1.5e300]},
    "$.maximum": {"type": "integer", "maximum": 2**53 + 1},
    "$.multipleOf": {"type": "number", "multipleOf": 0.01},
    "$.minProperties": {"type": "object", "minProperties": 2, "required": ["a"]},
    "$.maxProperties": {"properties": {"a": {}, "b": {}}, "maxProperties": 1, "type": "object"},
    "$.oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "$.format": {"type": "string", "format": "iri"},
    "$.type": {"type": "text"},
    "$.nullable": {"type": "string", "nullable": True},
    "$.x-guidance": {"x-guidance": {"lenient": True}, "uniqueItems": True},
    "$.madeUp": {"madeUp": 1},
    "$.$schema": {"$schema": "http://127.0.0.1:9/schema"},
    "$.$ref": {"$ref": "http://127.0.0.1:9/x"},
    "$.properties.a.items.not": {"properties": {"a": {"items": {"not": {}}}}},
    '$.properties["a b"].anyOf[1].not': {"properties": {"a b": {"anyOf": [True, {"not": {}}]}}},
    "$.$defs.d.$id": {"$defs": {"d": {"$id": "d"}}},
    "$.properties.a.$ref": {
        "properties": {"a": {"$ref": "#/examples/0"}},
        "examples": [{"uniqueItems": True}],
    },
    "required property 'a'": {
        "properties": {"a": {"minLength": 5, "maxLength": 3, "type": "string"}},
        "required": ["a"],
        "type": "object",
    },
    "$.pattern": {"type": "string", "pattern": "^(?=.*[0-9]).{8,}$"},
    "allows no text at all": {"$ref": "#"},
    "$: the schema is false": False,
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_enforced_is_named(named):
    with pytest.raises(RequestError) as caught:
        compile_here("json_schema", REFUSED[named])
    assert named in str(caught.value)


@pytest.mark.parametrize("keyword", sorted(keywords.REFUSED))
def test_every_refused_keyword_is_refused_at_any_depth(keyword):
    value = {"minContains": 1, "maxContains": 1, "uniqueItems": True}.get(keyword, {})
    with pytest.raises(RequestError, match=re.escape(keyword)):
        compile_here("json_schema", {"items": {"properties": {"x": {keyword: value}}}})


def test_a_property_may_be_called_like_a_keyword():
    schema = {
        "type": "object",
        "properties": {"not": {"type": "null"}, "$ref": {"const": 1}},
        "required": ["not", "$ref"],
        "additionalProperties": False,
    }
    assert assert_sound(schema) == ['{"not": null, "$ref": 1}'] * 20


def test_text_that_is_no_schema():
    for text in ("{", "3", "[]", '{"const": NaN}', '{"const": 1e999}', "[" * 5000):
        with pytest.raises(RequestError, match="invalid json_schema"):
            compile_here("json_schema", text)


def test_the_table_of_keywords_in_the_docs():
    pages = (Path(__file__).resolve().parents[2] / "docs").rglob("*.md")
    assert any(keywords.markdown_table() in page.read_text(encoding="utf-8") for page in pages)


def test_every_keyword_of_the_drafts_has_a_treatment():
    """Keywords of the metaschemas are enforced, structure, annotations or refused; none is new."""
    known = (
        keywords.ENFORCED.keys()
        | keywords.STRUCTURE.keys()
        | keywords.ANNOTATIONS
        | keywords.REFUSED
    )
    for validator in (jsonschema.Draft7Validator, jsonschema.Draft4Validator):
        assert validator.META_SCHEMA["properties"].keys() <= known
    for uri in jsonschema.Draft202012Validator.META_SCHEMA["allOf"]:
        from jsonschema_specifications import REGISTRY

        meta = REGISTRY.contents("https://json-schema.org/draft/2020-12/" + uri["$ref"])
        assert meta["properties"].keys() <= known
