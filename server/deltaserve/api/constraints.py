"""What a request wants its answer to be, as a grammar."""

from __future__ import annotations

import json
import re
from typing import Any

from deltaserve.api.schemas import Generation, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from deltaserve.engine.grammars import Grammar
from deltaserve.errors import BadRequest

ANY_OBJECT = {"type": "object"}


def read_grammar(body: Generation) -> Grammar | None:
    """The grammar of `response_format` or `structured_outputs`, None for free text. Raises BadRequest."""
    formatted = _of_format(body)
    if body.structured_outputs is None:
        return formatted
    if formatted is not None:
        raise BadRequest("response_format and structured_outputs exclude each other", param="structured_outputs")
    return _of_fields(body.structured_outputs)


def json_grammar(schema: dict[str, Any] | str) -> Grammar:
    """Of a JSON schema, also one spelled out as text."""
    return Grammar("json", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))


def _of_format(body: Generation) -> Grammar | None:
    match body.response_format:
        case JsonObjectFormat():
            return json_grammar(ANY_OBJECT)
        case JsonSchemaFormat(json_schema=named):
            if named.schema_ is None:
                raise BadRequest("json_schema needs a schema", param="response_format")
            return json_grammar(named.schema_)
        case _:
            return None


def _of_fields(fields: StructuredOutputs) -> Grammar:
    given = [name for name in StructuredOutputs.model_fields if getattr(fields, name) not in (None, False)]
    if len(given) != 1:
        known = ", ".join(name.rstrip("_") for name in StructuredOutputs.model_fields)
        raise BadRequest(f"structured_outputs takes exactly one of {known}", param="structured_outputs")
    if fields.json_ is not None:
        return json_grammar(fields.json_)
    if fields.regex is not None:
        return Grammar("regex", fields.regex)
    if fields.choice is not None:
        return Grammar("regex", "|".join(map(re.escape, fields.choice)))
    if fields.grammar is not None:
        return Grammar("grammar", fields.grammar)
    return json_grammar(ANY_OBJECT)
