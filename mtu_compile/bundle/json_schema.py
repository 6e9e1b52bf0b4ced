"""The JSON Schema of a manifest, made from its dataclasses.

    python -m mtu_compile.bundle.json_schema > docs/manifest.schema.json

It says what is in a manifest, for other programs. Paths that have to be in the list of files, hashes that have to fit,
and the other rules that are no type are checked by ``Manifest.check`` and ``bundle.read`` alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mtu_compile.bundle.manifest import SCHEMA_VERSION, Manifest
from mtu_compile.core.schema import Entries, Length, Range, Rule, field_types

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PLAIN: Mapping[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    None: {"type": "null"},
    Any: {},
}


def manifest_schema() -> Schema:
    """The schema of ``manifest.json`` as this version writes it."""
    definitions: dict[str, Schema] = {}
    body = _dataclass(Manifest, definitions)
    body["properties"] |= {
        "schema_version": {"const": SCHEMA_VERSION},
        "manifest_sha256": {"type": "string", "description": "SHA-256 of the file as it would be without this entry"},
    }
    body["required"] += ["schema_version", "manifest_sha256"]
    return {"$schema": DIALECT, "title": "manifest.json of an mtu-compile bundle", **body, "$defs": definitions}


def schema_of(kind: Any, definitions: dict[str, Schema]) -> Schema:
    """The schema of an annotated type; dataclasses go to ``definitions``, by their name.

    Raises:
        TypeError: a type that ``mtu_compile.core.schema.conform`` does not know either.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        narrowed = schema_of(arguments[0], definitions)
        for rule in arguments[1:]:
            narrowed = {**narrowed, **_narrowing(rule, definitions)}
        return narrowed
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": schema_of(arguments[0], definitions)}
    if origin is tuple:
        items = [schema_of(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1], definitions)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # so that a type may hold itself
            definitions[kind.__name__] = _dataclass(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    raise TypeError(f"{kind!r} has no JSON form")


def _dataclass(kind: type, definitions: dict[str, Schema]) -> Schema:
    types = field_types(kind)
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    described: Schema = {"description": (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")}
    properties = {name: schema_of(types[name], definitions) for name in (one.name for one in fields(kind))}
    return {**described, "type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _narrowing(rule: Any, definitions: dict[str, Schema]) -> Schema:
    """What a rule beside a type adds to its schema."""
    if isinstance(rule, Range):
        ends = {"minimum": rule.low, "maximum": rule.high}
        return {name: end for name, end in ends.items() if not math.isinf(end)}
    if isinstance(rule, Length):
        least: Schema = {"minItems": rule.low, "minProperties": rule.low}
        return least if rule.high is None else {**least, "maxItems": rule.high, "maxProperties": rule.high}
    if isinstance(rule, Entries):
        known = {name: schema_of(kind, definitions) for name, kind in (*rule.needed.items(), *rule.known.items())}
        narrowed: Schema = {"type": "object", "properties": known, "required": list(rule.needed)}
        if rule.last_words:
            others = f"(?!(?:{'|'.join(known)})$)" if known else ""  # patterns hold for named properties, too
            narrowed["patternProperties"] = {
                f"^{others}(?:.*_)?{word}$": schema_of(kind, definitions) for word, kind in rule.last_words.items()
            }
        return narrowed
    assert isinstance(rule, Rule)
    return {"description": rule.expected} if rule.pattern is None else {"pattern": f"^(?:{rule.pattern})$"}


if __name__ == "__main__":
    print(json.dumps(manifest_schema(), indent=1))
