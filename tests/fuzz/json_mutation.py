"""Changes to JSON that keep it JSON, or nearly."""

from __future__ import annotations

import copy
import json
import random
from typing import Any


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


#: What programs trip over.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "nan", "inf", "-inf", "\ud800", "\0", "\x1b[2J", "\u202e", "a" * 5000, "é", "e\u0301"),
    *("../x", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", "C:x", "a\\b", "built/x", "manifest.json", "unet"),
    *("0" * 64, "SHA256:" + "A" * 43, "static", "shared", "openvino", "t2i"),
    *([], {}, [[]], [{}], {"": ""}, {"a": None}, [None] * 3, [0.5, 0.5]),
    *(_deep(63), _deep(70), _deep(900)),
)

#: What stands in for a value once the text is written: no number that ``json`` writes.
_RAW = (
    "1e999",
    "-1e999",
    "1" * 5000,
    "NaN",
    "Infinity",
    "01",
    "1.",
    "0x1",
    "'a'",
    "[1,]",
    "{,}",
    '"\\ud800\\u0041"',
    "1E2",
)
_MARK = "\u2063mark\u2063"


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    """Some values replaced, moved, removed or doubled; ``None`` if ``data`` is not JSON."""
    try:
        value = json.loads(data)
        value = change(value, rng)
        raw = rng.random() < 0.1
        if raw:
            value = _replace(value, rng, _MARK)
        text = json.dumps(value, indent=2 if rng.random() < 0.1 else None, ensure_ascii=rng.random() < 0.9)
    except (ValueError, RecursionError):
        return None
    if raw:
        text = text.replace(json.dumps(_MARK), rng.choice(_RAW)).replace(_MARK, "x")
    if rng.random() < 0.05:
        text = _twice(text, rng)
    return text.encode(errors="surrogatepass")


def change(value: Any, rng: random.Random) -> Any:
    """A few changes somewhere in ``value``."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        value = _change_one(value, rng)
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found, todo = [], [(path, value)]
    while todo:
        here, one = todo.pop()
        found.append(here)
        if isinstance(one, dict):
            todo += [((*here, key), child) for key, child in one.items()]
        elif isinstance(one, list):
            todo += [((*here, i), child) for i, child in enumerate(one[:50])]
        if len(found) > 5000:
            break
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    _at(value, path[:-1])[path[-1]] = new
    return value


def _replace(value: Any, rng: random.Random, new: Any) -> Any:
    return _set(value, rng.choice(_places(value)), new)


def _change_one(value: Any, rng: random.Random) -> Any:
    places = _places(value)
    path = rng.choice(places)
    here = _at(value, path)
    way = rng.randrange(8)
    if way == 0:
        return _set(value, path, copy.deepcopy(rng.choice(HOSTILE)))
    if way == 1:  # what is somewhere else
        return _set(value, path, copy.deepcopy(_at(value, rng.choice(places))))
    if way == 2 and path:
        parent = _at(value, path[:-1])
        del parent[path[-1]]
        return value
    if way == 3 and isinstance(here, dict):
        name = rng.choice([*here, *(one for one in HOSTILE if isinstance(one, str))])
        here[name] = copy.deepcopy(rng.choice(HOSTILE))
        return value
    if way == 4 and isinstance(here, list):
        here.insert(rng.randrange(len(here) + 1), copy.deepcopy(rng.choice(here or HOSTILE)))
        return value
    if way == 5 and path and isinstance(parent := _at(value, path[:-1]), dict):  # another key
        other = rng.choice([one for one in HOSTILE if isinstance(one, str)])
        parent[other] = parent.pop(path[-1])
        return value
    if isinstance(here, bool) or here is None:
        return _set(value, path, rng.choice((True, False, None)))
    if isinstance(here, int):
        return _set(value, path, here + rng.choice((-1, 1, 10, -here, 2**31, here)))
    if isinstance(here, float):
        return _set(value, path, here * rng.choice((-1.0, 0.0, 1e10, 1e300, 0.1)))
    if isinstance(here, str) and here:
        at = rng.randrange(len(here))
        return _set(value, path, here[:at] + rng.choice(("", "x", "/", "..", "\x07", "É", here)) + here[at + 1 :])
    return _set(value, path, copy.deepcopy(rng.choice(HOSTILE)))


def _twice(text: str, rng: random.Random) -> str:
    """One line more than once: a key that is there twice."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    if lines[at].rstrip().endswith(","):
        lines.insert(at, lines[at])
    return "\n".join(lines)
