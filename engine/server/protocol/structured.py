"""Structured output: what the reply must be, in OpenAI's words (response_format), vLLM's and llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.errors import InvalidRequest
from engine.sampling.grammar import (
    make_choice_grammar,
    make_ebnf_grammar,
    make_json_grammar,
    make_regex_grammar,
    make_tags_grammar,
)

MAX_STRUCTURES = 128
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class JsonSchema(BaseModel):
    """The schema of response_format. Every schema is obeyed, whether `strict` or not."""

    model_config = STRICT
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class Structure(BaseModel):
    """One of the tags of StructuralTag: `begin`, a value that fits `schema`, `end`."""

    model_config = STRICT
    begin: str
    schema_: dict[str, Any] = Field(alias="schema")
    end: str


class StructuralTag(BaseModel):
    """Free text in which each of `triggers` begins one of the structures, as vLLM and SGLang have it."""

    model_config = STRICT
    structures: list[Structure] = Field(min_length=1, max_length=MAX_STRUCTURES)
    triggers: list[str] = Field(min_length=1, max_length=MAX_STRUCTURES)


class ResponseFormat(BaseModel):
    """OpenAI's response_format, and structural tags."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[Structure] | None = Field(default=None, min_length=1, max_length=MAX_STRUCTURES)
    triggers: list[str] | None = Field(default=None, min_length=1, max_length=MAX_STRUCTURES)

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing_content", "type json_schema needs the field 'json_schema'")
        if self.type == "structural_tag" and not (self.structures and self.triggers):
            raise PydanticCustomError("missing_content", "type structural_tag needs 'structures' and 'triggers'")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs. A field that is not one of these would be a wish that nobody obeys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    json_: Any = Field(default=None, alias="json")  # an object, or the text of one
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None  # the text of a JSON object


class StructuredFields(Protocol):
    """The fields of a request that say what its reply must be; at most one may."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    json_schema: dict[str, Any] | None
    grammar: str | None


def make_output_grammar(fields: StructuredFields) -> tuple[str, str] | None:
    """The grammar of the reply and the parameter that asks for it; None when it is free.

    Raises InvalidRequest for a grammar that is too large or cannot be read, and for two at once.
    """
    wishes = [*_list_format(fields.response_format), *_list_outputs(fields.structured_outputs)]
    makers: dict[str, Callable[..., str]] = {
        "guided_json": _make_json,
        "guided_regex": make_regex_grammar,
        "guided_choice": make_choice_grammar,
        "guided_grammar": make_ebnf_grammar,
        "json_schema": _make_json,
        "grammar": make_ebnf_grammar,
    }
    wishes += [(n, make, value) for n, make in makers.items() if (value := getattr(fields, n)) not in (None, "", {})]
    if len(wishes) > 1:
        raise InvalidRequest(
            f"{wishes[0][0]} and {wishes[1][0]} both say what the reply must be", hint="send one", param=wishes[1][0]
        )
    return next(((make(value, param=name), name) for name, make, value in wishes), None)


def _list_format(wanted: ResponseFormat | None) -> list[tuple[str, Callable[..., str], Any]]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "structural_tag":
        return [("response_format", _make_tags, wanted)]
    schema = wanted.json_schema.schema_ if wanted.json_schema and wanted.type == "json_schema" else None
    return [("response_format", make_json_grammar, schema)]


def _list_outputs(wanted: StructuredOutputs | None) -> list[tuple[str, Callable[..., str], Any]]:
    if wanted is None:
        return []
    makers: list[tuple[Any, Callable[..., str]]] = [
        (wanted.json_, _make_json),
        (wanted.regex, make_regex_grammar),
        (wanted.choice, make_choice_grammar),
        (wanted.grammar, make_ebnf_grammar),
        (wanted.structural_tag, _make_tags),
    ]
    wishes: list[tuple[str, Callable[..., str], Any]] = [
        ("structured_outputs", make, value) for value, make in makers if value is not None
    ]
    return [*wishes, ("structured_outputs", make_json_grammar, None)] if wanted.json_object else wishes


def _make_tags(value: ResponseFormat | str, *, param: str) -> str:
    """vLLM takes structural tags as text, too."""
    try:
        tag = StructuralTag.model_validate_json(value) if isinstance(value, str) else value
    except ValueError as error:
        reason = "it needs 'structures' (begin, schema, end) and 'triggers'"
        raise InvalidRequest(f"structural_tag cannot be read: {reason}", param=param) from error
    tags = [(one.begin, one.schema_, one.end) for one in tag.structures or ()]
    return make_tags_grammar(tags, tag.triggers or (), param=param)


def _make_json(schema: Any, *, param: str) -> str:
    """vLLM takes the schema as text, too."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = ""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} is not a JSON schema", hint="send an object", param=param)
    return make_json_grammar(schema, param=param)
