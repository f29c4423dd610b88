"""JSON schema of the files, made from their dataclasses, for editors that complete and check YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from prunesearch.strict import hints_of, is_mapping, is_pairs, to_mapping


def json_schema(kind: type) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a dataclass, for editors that complete and check YAML."""
    definitions: dict[str, Any] = {}
    schema = _schema(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        **schema,
        "$defs": definitions,
    }


def _schema(kind: Any, definitions: dict[str, Any], limits: Mapping[str, Any] = {}) -> dict[str, Any]:
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part, definitions, limits) for part in parameters]}
    if origin is Literal:
        return {"enum": list(parameters)}
    if dataclasses.is_dataclass(kind):
        name = typing.cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # ends the recursion if a class contains itself
            definitions[name] = _object_schema(typing.cast(type, kind), definitions)
        return {"$ref": f"#/$defs/{name}"}
    if is_pairs(kind):
        value = _schema(get_args(parameters[0])[1], definitions, limits)
        return {"type": "object", "additionalProperties": value, **_most("maxProperties", limits)}
    if origin is tuple:
        item = _schema(parameters[0], definitions, limits)
        return {"anyOf": [{"type": "array", "items": item, **_most("maxItems", limits)}, item]}
    if is_mapping(kind):
        return {"type": "object"}
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    bounds = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
    if kind is str:
        bounds = {"pattern": "pattern"}
    given = {bounds[key]: limits[key] for key in bounds if key in limits and kind not in (bool, type(None))}
    return {"type": names[kind], **given}


def _most(word: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    return {word: limits["most"]} if "most" in limits else {}


def _object_schema(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = hints_of(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        schema = _schema(hints[field.name], definitions, field.metadata)
        if "text" in field.metadata:
            schema["description"] = field.metadata["text"]
        if field.default is dataclasses.MISSING:
            required.append(field.name)
        elif field.default is not None:
            schema["default"] = to_mapping(field.default)
        properties[field.name] = schema
    text = (kind.__doc__ or "").strip().split("\n")[0]
    return {
        "type": "object",
        "description": text,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
