"""Output that follows a schema: of a model of random weights, every document is valid."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from support.serving import Client
from support.slow import slow_except

STRING = {"type": "string", "maxLength": 6}


def record(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    names = [*properties]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "numbers": record(age={"type": "integer", "minimum": 0, "maximum": 150}, ok={"type": "boolean"}),
    "text": record(name={"type": "string", "minLength": 2, "maxLength": 8}),
    "choice": record(colour={"enum": ["red", "green", 3, None]}, kind={"const": "a"}),
    "list": record(tags={"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 3}),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}),
    "date": record(day={"type": "string", "format": "date"}),
    "either": record(value={"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}, STRING]}),
    "multiple": record(step={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "nested": record(inner=record(left=STRING, right=record(deep={"type": "boolean"}))),
    "recursive": {
        **record(first={"$ref": "#/$defs/node"}),
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"k": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["k"],
                "additionalProperties": False,
            }
        },
    },
}


@pytest.mark.parametrize("name", slow_except(SCHEMAS, "either", "recursive"))
@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_every_document_is_valid(client: Client, name: str, count: int) -> None:
    """Some are cut off by the limit of tokens, and say so; all others are whole, and valid."""
    schema, whole = SCHEMAS[name], 0
    wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    for seed in range(0, count, 8):
        prompt = {"messages": [{"role": "user", "content": "Go"}], "n": min(8, count - seed), "seed": seed}
        answer = client.post("/v1/chat/completions", **prompt, response_format=wanted, max_tokens=300)
        for choice in answer["choices"]:
            assert choice["finish_reason"] in ("stop", "length")
            if choice["finish_reason"] == "stop":
                document = json.loads(choice["message"]["content"])
                jsonschema.validate(document, schema, format_checker=jsonschema.FormatChecker())
                whole += 1
    assert whole > count / 3  # the recursive one may go on for ever
