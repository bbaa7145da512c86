"""The fields of a request that hold its text to something: OpenAI's, vLLM's, vLLM's older ones."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from quatom.engine.sampling import StructuredOutput
from quatom.errors import RequestError
from quatom.serving.closed_model import ClosedModel, Listed

Choices = Annotated[Listed[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Schema = dict[str, Any] | str


def _json(value: Schema) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class StructuredOutputs(ClosedModel):
    """vLLM's constraint object; at most one constraint."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: Schema | None = None
    # Generated JSON has no free whitespace in any case.
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None

    def wanted(self) -> list[StructuredOutput]:
        """The constraints that are set."""
        found: list[StructuredOutput] = []
        if self.json_ is not None:
            found.append(StructuredOutput("json_schema", _json(self.json_)))
        if self.json_object:
            found.append(StructuredOutput("json_object"))
        if self.regex is not None:
            found.append(StructuredOutput("regex", self.regex))
        if self.choice is not None:
            found.append(StructuredOutput("choice", json.dumps(self.choice)))
        if self.grammar is not None:
            found.append(StructuredOutput("grammar", self.grammar))
        if self.structural_tag is not None:
            found.append(StructuredOutput("structural_tag", _json(self.structural_tag)))
        return found


class JsonSchemaFormat(ClosedModel):
    """response_format.json_schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ClosedModel):
    """OpenAI's constraint, and vLLM's structural tags, which are given beside the type."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = None
    structures: Listed[dict[str, Any]] | None = None
    triggers: Listed[str] | None = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Self:
        allowed = {
            "json_schema": {"json_schema"},
            "structural_tag": {"format", "structures", "triggers"},
        }.get(self.type, set())
        given = self.model_dump(exclude_none=True, exclude={"type"}).keys()
        if unfit := given - allowed:
            raise ValueError(f"{min(unfit)} does not belong to type {self.type!r}")
        if allowed and not given:
            raise ValueError(f"type {self.type!r} needs {' or '.join(sorted(allowed))}")
        return self

    def wanted(self) -> list[StructuredOutput]:
        """The constraint, if any."""
        if self.type == "json_object":
            return [StructuredOutput("json_object")]
        if self.type == "structural_tag":
            tag = self.model_dump(exclude_none=True)
            return [StructuredOutput("structural_tag", json.dumps(tag))]
        if self.json_schema is not None:
            return [StructuredOutput("json_schema", json.dumps(self.json_schema.schema_))]
        return []


class ConstraintFields(ClosedModel):
    """Every field that constrains; at most one of them is set."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: None = None

    def structured(self) -> StructuredOutput | None:
        """The constraint, whichever field it is in.

        Raises:
            RequestError: there are several.
        """
        older = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        found = StructuredOutputs.model_validate(older).wanted()
        found += self.response_format.wanted() if self.response_format else []
        found += self.structured_outputs.wanted() if self.structured_outputs else []
        if len(found) > 1:
            kinds = ", ".join(item.kind for item in found)
            raise RequestError(f"ask for one kind of structured output, not for {kinds} at once")
        return found[0] if found else None
