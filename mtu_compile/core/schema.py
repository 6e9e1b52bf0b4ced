"""JSON that somebody else wrote: read strictly, and held against annotated types before anything is done with it.

A schema is a type: a dataclass, ``Mapping``, ``tuple``, ``Literal``, ``Enum`` of texts, union or plain type, narrowed
with ``Annotated``:

    downscale: Annotated[int, Range(1, 64)] | None

``conform`` gives the value back as that type, or says which key holds what, and what was expected there. It is here and
not taken from a library because boards read tasks too, and their packages have to stay few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from mtu_compile.core.errors import ModelError, MtuError

#: Levels of lists and objects in one file; real configs have five. Python's own parser gives up at about a thousand.
DEEPEST = 64


@dataclass(frozen=True)
class Range:
    """Of a number: from ``low`` to ``high``, both included."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def describe(self, kind: str) -> str:
        low, high = (f"{end:.15g}" for end in (self.low, self.high))
        if math.isinf(self.high):
            return kind if math.isinf(self.low) else f"{kind} of at least {low}"
        return f"{kind} of at most {high}" if math.isinf(self.low) else f"{kind} from {low} to {high}"


@dataclass(frozen=True)
class Length:
    """Of a list or an object: how many entries."""

    low: int = 0
    high: int | None = None

    def holds(self, value: Any) -> bool:
        return self.low <= len(value) and (self.high is None or len(value) <= self.high)

    def describe(self, kind: str) -> str:
        if self.low == self.high:
            return f"{self.low} entries: {kind}"
        return f"{self.low} to {self.high} entries: {kind}" if self.high else f"{self.low} or more entries: {kind}"


@dataclass(frozen=True)
class Rule:
    """Anything else: what has to hold, what it is called (``"a number above 0"``), and the regular expression of it."""

    fits: Callable[[Any], bool]
    expected: str
    pattern: str | None = None

    def holds(self, value: Any) -> bool:
        return self.fits(value)

    def describe(self, kind: str) -> str:
        return self.expected


@dataclass(frozen=True, eq=False)
class Entries:
    """Of an object that stays one: the type of each entry. Others hold anything; nothing is converted.

    Attributes:
        needed: entries that have to be there.
        known: entries that may.
        last_words: others, by the last word of their name, words being parted by ``_``.
    """

    needed: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)
    last_words: Mapping[str, Any] = field(default_factory=dict)

    def check(self, value: Mapping[str, Any], key: str) -> None:
        """``Mismatch`` for the first entry that is missing or wrong."""
        for name, kind in self.needed.items():
            if name not in value:
                raise Mismatch(_join(key, name), None, describe(kind))
        for name, kind in (*self.needed.items(), *self.known.items()):
            if name in value:
                conform(kind, value[name], _join(key, name))
        others = (name for name in value if name not in self.needed and name not in self.known)
        for name in others:
            if (kind := self.last_words.get(name.rpartition("_")[2])) is not None:
                conform(kind, value[name], _join(key, name))


class Mismatch(ModelError):
    """A value that is not what its schema says. Whoever knows the file says ``at(file)``.

    Attributes:
        key: where it is (``"tasks[2].downscale"``), ``""`` for the whole.
        found: what is there, in JSON and shortened, or ``None`` if nothing is.
        expected: what belongs there, in words.
    """

    def __init__(self, key: str, found: str | None, expected: str) -> None:
        self.key, self.found, self.expected = key, found, expected
        found = "missing" if found is None else found
        super().__init__(f"{key} is {found}, expected {expected}" if key else f"is {found}, expected {expected}")

    def at(self, place: object, *, error: type[MtuError] = ModelError, hint: str | None = None) -> MtuError:
        """The same as an ``error`` about a file: ``FILE: KEY is VALUE, expected …``."""
        return error(f"{place}{': ' if self.key else ' '}{self.message}", hint=hint)


def read_json(
    path: Path, *, error: type[MtuError] = ModelError, hint: str = "fetch the file again", infinities: bool = False
) -> Any:
    """The JSON in ``path``; ``error`` naming the file if it is missing, damaged, not UTF-8, too deep or not JSON.

    With ``infinities``, ``Infinity`` and ``-Infinity`` are numbers, as diffusers writes them (``lambda_min_clipped``).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as missing:
        raise error(f"{path} is missing", hint=hint) from missing
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read: {problem}", hint=hint) from problem
    try:
        return parse_json(text, infinities=infinities)
    except ValueError as problem:
        raise error(f"{path} is not JSON: {problem}", hint=hint) from problem


def parse_json(text: str, *, infinities: bool = False, strict_keys: bool = False) -> Any:
    """``json.loads`` without what JSON does not have (``NaN``, ``Infinity``) and not too deep; ``ValueError`` else.

    With ``strict_keys``, a key that is there twice, of which readers take one or the other, is refused, and so is one
    with letters that do not print.
    """
    pairs = _strict_object if strict_keys else None
    try:
        value = json.loads(text, parse_constant=_infinity if infinities else _refuse_constant, object_pairs_hook=pairs)
    except RecursionError as deep:
        raise ValueError(f"it has more than {DEEPEST} levels") from deep
    level, depth = [value], 1
    while level := [child for one in level if isinstance(one, (list, dict)) for child in _children(one)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")
    return value


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} is there twice")
    if odd := next((key for key in found if not key.isprintable()), None):
        raise ValueError(f"the key {odd[:60]!a} has letters that do not print")
    return found


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _children(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def conform(kind: Any, value: Any, key: str = "") -> Any:
    """``value``, from JSON, as ``kind``; lists become tuples and whole numbers floats where ``kind`` says so.

    Raises:
        Mismatch: naming key, value and what was expected.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        try:
            conformed = conform(args[0], value, key)
        except Mismatch as mismatch:
            if mismatch.key != key:
                raise
            raise Mismatch(key, show(value), describe(kind)) from mismatch
        for rule in args[1:]:
            if isinstance(rule, Entries):
                rule.check(conformed, key)
            elif not rule.holds(conformed):
                raise Mismatch(key, show(value), rule.describe(describe(args[0])))
        return conformed
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _conform_union(kind, args, value, key)
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if isinstance(value, str) and value == member.value:
                return member
        raise Mismatch(key, show(value), describe(kind))
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(
                conform(one, item, f"{key}[{i}]") for i, (one, item) in enumerate(zip(kinds, value, strict=True))
            )
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {name: conform(args[1], item, _join(key, name)) for name, item in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return _conform_dataclass(kind, value, key)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _to_float(value)
        if math.isfinite(number):
            return number
    elif kind is str and isinstance(value, str):
        if not any("\ud800" <= letter <= "\udfff" for letter in value):  # half a letter, which no encoding has
            return value
    elif (
        (kind in (int, bool) and type(value) is kind)
        or (kind in (None, NoneType) and value is None)
        or (kind is Path and isinstance(value, Path))  # put there by whoever knows its folder: JSON has none
    ):
        return value
    raise Mismatch(key, show(value), describe(kind))


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf


def _conform_union(kind: Any, kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    inner: list[Mismatch] = []
    for one in kinds:
        try:
            return conform(one, value, key)
        except Mismatch as mismatch:
            inner.append(mismatch)
    # What fits all but for one of its entries is best told about that entry.
    deepest = max(inner, key=lambda one: len(one.key))
    raise deepest if len(deepest.key) > len(key) else Mismatch(key, show(value), describe(kind))


def _conform_dataclass(kind: type, value: Mapping[str, Any], key: str) -> Any:
    hints = field_types(kind)
    known = {one.name: one for one in fields(kind)}
    for name in value:
        if name not in known:
            raise Mismatch(_join(key, name), show(value[name]), f"no such key; known are {', '.join(known)}")
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise Mismatch(_join(key, name), None, describe(hints[name]))
    values = {name: conform(hints[name], item, _join(key, name)) for name, item in value.items()}
    try:
        return kind(**values)
    except Mismatch as mismatch:  # entries that do not go together
        raise Mismatch(_join(key, mismatch.key), mismatch.found, mismatch.expected) from mismatch


@lru_cache(maxsize=64)
def field_types(kind: type) -> Mapping[str, Any]:
    """The annotations of a dataclass by field, with what narrows them."""
    return get_type_hints(kind, include_extras=True)


def _join(key: str, name: object) -> str:
    name = show(name)[1:-1] if isinstance(name, str) else name
    return f"{key}.{name}" if key else str(name)


def show(value: object) -> str:
    """``value`` as it stands in the file, not longer than 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode(errors="backslashreplace").decode()  # half a letter cannot be printed
    return text if len(text) <= 60 else f"{text[:57]}…"


def describe(kind: Any) -> str:
    """``kind`` in words: ``"a whole number from 1 to 64 or null"``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = describe(args[0])
        for rule in args[1:]:
            words = words if isinstance(rule, Entries) else rule.describe(words)
        return words
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(one) for one in args))
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(one) for one in args)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(json.dumps(member.value) for member in kind)
    if origin is tuple:
        return (
            f"a list of {len(args)} values" if args[-1] is not Ellipsis else f"a list, each entry {describe(args[0])}"
        )
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        NoneType: "null",
        None: "null",
    }
    if kind in plain:
        return plain[kind]
    return "anything" if kind is Any else "an object"
