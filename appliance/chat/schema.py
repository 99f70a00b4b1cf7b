"""JSON schemas as rules of a grammar, so that an answer can only be what the schema describes.

What grammars cannot say is either refused (strict) or left out, so that an answer may then break that one constraint and
no other. Sizes are bounded here; how hard a grammar is to follow, in `gbnf.py`. Invariant: the work is bounded by the
schema's size, and recursion by MAX_DEPTH. One builder belongs to one grammar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.chat import integers
from appliance.chat.gbnf import MAX_REPEATS, GrammarError

MAX_DEPTH = 32
MAX_NODES = 4_000
MAX_ENUM = 1_000
MAX_PROPERTIES = 200
MAX_TEXT = 48 * 1024

_STRICT_REFUSES = (
    "pattern", "multipleOf", "uniqueItems", "contains",
    "minContains", "maxContains", "patternProperties", "propertyNames", "minProperties", "maxProperties", "not", "if",
    "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef",
)  # fmt: skip

_POSITIVE = "positive"
_PRIMITIVES: Mapping[str, str] = {
    "ws": r'| " " | "\n"{1,2} [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "digits": r"[0-9]{1,16}",
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." digits)? ([eE] [-+]? [0-9]{1,3})?',
    _POSITIVE: r'("0" | [1-9] [0-9]{0,15}) ("." digits)? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "object": r'"{" ws (member ("," ws member)*)? ws "}"',
    "member": r'string ":" ws value',
    "array": r'"[" ws (value ("," ws value)*)? ws "]"',
    "value": r"object | array | string | number | boolean | null",
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
    "date-time": r'date "T" time',
    "uuid": r'[0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{12}',
}
_USES: Mapping[str, Sequence[str]] = {
    "string": ("char",),
    "number": ("integer", "digits"),
    _POSITIVE: ("digits",),
    "object": ("ws", "member"),
    "member": ("string", "ws", "value"),
    "array": ("ws", "value"),
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "date-time": ("date", "time"),
}
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FORMATS = ("date", "time", "date-time", "uuid")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def literal(text: str) -> str:
    """`text` and nothing else, as GBNF."""
    escaped = "".join(_ESCAPES.get(c) or (f"\\x{ord(c):02X}" if c < " " or c == "\x7f" else c) for c in text)
    return f'"{escaped}"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class GrammarBuilder:
    """Rules by name. `rule` and `schema` return what refers to them."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        """By what a rule says: the same is said once."""
        self._chars = 0

    def rule(self, says: str) -> str:
        if says not in self._names:
            self._add(f"r{len(self._names)}", says)
        return self._names[says]

    def reserve(self) -> str:
        """A name for a rule that refers to itself; `define` says what it is."""
        name = f"s{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, says: str) -> None:
        self._add(name, says)

    def primitive(self, name: str) -> str:
        if name not in self._rules:
            self._rules[name] = _PRIMITIVES[name]
            for used in _USES.get(name, ()):
                self.primitive(used)
        return name

    def schema(self, schema: object, *, strict: bool) -> str:
        return _Conversion(self, schema, strict).of(schema, 0)

    def text(self, root: str) -> str:
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {says}" for name, says in self._rules.items())])

    def _add(self, name: str, says: str) -> None:
        self._chars += len(says)
        if self._chars > MAX_TEXT:
            raise GrammarError("is too large a schema")
        self._rules[name] = says
        self._names[says] = name


class _Conversion:
    """One schema with its own definitions."""

    def __init__(self, grammar: GrammarBuilder, root: object, strict: bool) -> None:
        self._grammar = grammar
        self._root = root
        self._strict = strict
        self._nodes = 0
        self._references: dict[str, str] = {}

    def of(self, schema: object, depth: int) -> str:
        """What refers to the values that the schema allows."""
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise GrammarError(f"is nested more than {MAX_DEPTH} deep")
        if self._nodes > MAX_NODES:
            raise GrammarError(f"has more than {MAX_NODES} parts")
        if schema is True:
            return self._grammar.primitive("value")
        if not isinstance(schema, dict):
            raise GrammarError("is not a schema: an object was expected, and nothing that allows no value at all")
        if self._strict and (unknown := next((key for key in _STRICT_REFUSES if key in schema), None)):
            raise GrammarError(f'uses "{unknown}", which is not supported: leave it out, or send strict false')
        if "$ref" in schema:
            return self._reference(schema["$ref"], depth)
        if "const" in schema:
            return self._constant(schema["const"])
        if "enum" in schema:
            return self._enum(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._any_of(schema, _listed(schema[key], key), depth)
        if "allOf" in schema:
            return self.of(_merged(schema, _listed(schema["allOf"], "allOf"), self._resolve), depth + 1)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            if not kind or len(kind) > len(_TYPES):
                raise GrammarError('has a "type" that is no list of types')
            return self._rule(" | ".join(self._typed({**schema, "type": one}, depth) for one in kind))
        if kind is None:
            kind = next((kind for kind, keys in _IMPLIED.items() if any(key in schema for key in keys)), None)
        if kind is None:
            return self._grammar.primitive("value")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind not in _TYPES:
            raise GrammarError('has a "type" that JSON does not know')
        if kind in ("integer", "number") and any(key in schema for key in _LIMITS):
            return self._limited(schema, kind)
        return self._grammar.primitive(kind)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _reference(self, reference: object, depth: int) -> str:
        if not isinstance(reference, str):
            raise GrammarError('has a "$ref" that is no string')
        if reference not in self._references:
            name = self._references[reference] = self._grammar.reserve()
            self._grammar.define(name, self.of(self._resolve(reference), depth + 1))
        return self._references[reference]

    def _resolve(self, reference: str) -> object:
        if reference != "#" and not reference.startswith("#/"):
            raise GrammarError('has a "$ref" to something that is not in it')
        found = self._root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and len(key) < 6 and int(key) < len(found):
                found = found[int(key)]
            else:
                raise GrammarError('has a "$ref" to something that is not in it')
        return found

    def _constant(self, value: object) -> str:
        try:
            return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except ValueError:
            raise GrammarError("has a constant that is no JSON: a number is too large") from None

    def _enum(self, values: object) -> str:
        listed = _listed(values, "enum", MAX_ENUM)
        return self._rule(" | ".join(map(self._constant, listed)))

    def _any_of(self, schema: dict[str, Any], options: list[Any], depth: int) -> str:
        shared = {key: value for key, value in schema.items() if key in ("type", "properties", "required")}
        return self._rule(
            " | ".join(
                self.of({**shared, **option} if shared and isinstance(option, dict) else option, depth + 1)
                for option in options
            )
        )

    def _string(self, schema: dict[str, Any]) -> str:
        form = schema.get("format")
        if isinstance(form, str) and form in _FORMATS:
            return self._rule(rf'"\"" {self._grammar.primitive(form)} "\""')
        if form is not None and self._strict:
            raise GrammarError(f'uses a "format" that is not supported: {", ".join(_FORMATS)} are')
        least, most = self._bounds(schema, "minLength", "maxLength")
        if (least, most) == (0, None):
            return self._grammar.primitive("string")
        return self._rule(rf'"\"" {_times(self._grammar.primitive("char"), least, most)} "\""')

    def _limited(self, schema: dict[str, Any], kind: str) -> str:
        limits = {key: schema[key] for key in _LIMITS if key in schema}
        if not all(type(limit) is int or (type(limit) is float and math.isfinite(limit)) for limit in limits.values()):
            raise GrammarError(f'has a limit of a {kind} that is no number: "{", ".join(limits)}"')
        if kind == "number":
            if self._strict and limits != {"minimum": 0}:
                raise GrammarError('limits a "number", which is supported for integers only, or to "minimum" 0')
            positive = self._grammar.primitive(_POSITIVE)
            return positive if limits.get("minimum", -1) >= 0 else self._grammar.primitive(kind)
        lows = [math.ceil(limits["minimum"])] if "minimum" in limits else []
        highs = [math.floor(limits["maximum"])] if "maximum" in limits else []
        lows += [math.floor(limits["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in limits else []
        highs += [math.ceil(limits["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in limits else []
        found = integers.between(max(lows, default=None), min(highs, default=None))
        if found is None:
            raise GrammarError("limits an integer so that there is none")
        return self._rule(found)

    def _array(self, schema: dict[str, Any], depth: int) -> str:
        space = self._grammar.primitive("ws")
        fixed = schema.get("prefixItems", schema["items"] if isinstance(schema.get("items"), list) else None)
        if fixed is not None:
            items = [self.of(item, depth + 1) for item in _listed(fixed, "prefixItems")]
            row = f' "," {space} '.join(items)
            return self._rule(f'"[" {space} {row} {space} "]"')
        item = self.of(schema.get("items", True), depth + 1)
        least, most = self._bounds(schema, "minItems", "maxItems")
        if most == 0:
            return self._rule(f'"[" {space} "]"')
        more = self._rule(f'"," {space} {item}')
        row = f"{item} {_times(more, max(0, least - 1), None if most is None else most - 1)}"
        return self._rule(f'"[" {space} {row if least else f"({row})?"} {space} "]"')

    def _bounds(self, schema: dict[str, Any], low: str, high: str) -> tuple[int, int | None]:
        """Counts that a grammar can keep; beyond, the upper bound is refused or left out."""
        least, most = schema.get(low, 0), schema.get(high)
        for bound in (least, most):
            if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 0):
                raise GrammarError(f'has a "{low}" or "{high}" that is no count')
        if most is not None and least > most:
            raise GrammarError(f'has a "{low}" above its "{high}"')
        if least > MAX_REPEATS or (self._strict and most is not None and most > MAX_REPEATS):
            raise GrammarError(f'has a "{low}" or "{high}" above {MAX_REPEATS}')
        return least, most if most is None or most <= MAX_REPEATS else None

    def _object(self, schema: dict[str, Any], depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or len(properties) > MAX_PROPERTIES:
            raise GrammarError(f'has "properties" that are no object of at most {MAX_PROPERTIES}')
        if not isinstance(required, list) or len(required) > MAX_PROPERTIES:
            raise GrammarError(f'has a "required" that is no list of at most {MAX_PROPERTIES}')
        named = dict(properties)
        named |= {key: True for key in required if isinstance(key, str) and key not in properties}
        extra = schema.get("additionalProperties", not named)
        space = self._grammar.primitive("ws")
        members = [(self._member(key, value, depth), key in required) for key, value in named.items()]
        if extra is not False:
            value = self.of(extra, depth + 1)
            more = f'{self._grammar.primitive("string")} ":" {space} {value}'
            if not members:
                return self._rule(f'"{{" {space} ({more} ("," {space} {more})*)? {space} "}}"')
            rest = self._rule(f'("," {space} {more})*')
        else:
            rest = ""
        return self._rule(f'"{{" {space} {self._members(members, rest)} {space} "}}"')

    def _member(self, key: str, value: object, depth: int) -> str:
        name = literal(json.dumps(key, ensure_ascii=False))
        return self._rule(f'{name} ":" {self._grammar.primitive("ws")} {self.of(value, depth + 1)}')

    def _members(self, members: list[tuple[str, bool]], rest: str) -> str:
        """In their order, optional ones or not, with commas between those that are there."""
        first: list[str] = []
        space = self._grammar.primitive("ws")
        for member, is_required in reversed(members):
            if is_required:
                first = []  # nothing after a required member can be the first
            first.insert(0, f"{member} {rest}".rstrip())
            one = f'"," {space} {member} {rest}'.rstrip() if is_required else f'("," {space} {member})? {rest}'.rstrip()
            rest = self._rule(one)
        if not any(is_required for _, is_required in members):
            return f"({' | '.join(first)})?" if first else ""
        return f"({' | '.join(first)})"

    def _rule(self, says: str) -> str:
        return self._grammar.rule(says)


_IMPLIED = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "format", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""The type that a schema without one means, by what it says besides."""


def _times(item: str, least: int, most: int | None) -> str:
    if most is None:
        return f"{item}*" if least == 0 else f"{item}{{{least},}}"
    return f"{item}{{{least},{most}}}" if most else ""


def _listed(value: object, key: str, most: int = MAX_NODES) -> list[Any]:
    if not isinstance(value, list) or not value or len(value) > most:
        raise GrammarError(f'has a "{key}" that is no list of 1 to {most}')
    return value


def _merged(schema: dict[str, Any], parts: list[Any], resolve: Any) -> dict[str, Any]:
    """allOf of object schemas as one; references one level deep are followed."""
    merged = {key: value for key, value in schema.items() if key != "allOf"}
    for part in parts:
        if isinstance(part, dict) and set(part) >= {"$ref"} and isinstance(part["$ref"], str):
            part = resolve(part["$ref"])
        if not isinstance(part, dict):
            raise GrammarError('has an "allOf" of something that is no schema')
        for key, value in part.items():
            if key == "properties" and isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = {**merged[key], **value}
            elif key == "required" and isinstance(value, list) and isinstance(merged.get(key), list):
                merged[key] = [*merged[key], *value]
            elif key in ("anyOf", "oneOf", "allOf", "$ref", "enum", "const") and key in merged:
                raise GrammarError(f'has an "allOf" with several "{key}", which is not supported')
            else:
                merged[key] = value
    return merged
