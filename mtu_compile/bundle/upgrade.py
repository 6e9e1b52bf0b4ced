"""Manifests of earlier schema versions, as the current one says it.

Version 1 said what was done with an engine in a sentence (``status``), and how a bundle was made in objects that could
hold anything beside what was known (``extra``, ``estimate``). Sentences that this project wrote become states; what was
nobody's is left out. Every value that is kept is held against its type as in any other manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from mtu_compile.bundle.engine import EngineState, Estimate
from mtu_compile.bundle.provenance import BuildProvenance, TaskProvenance
from mtu_compile.core.schema import Mismatch, field_types, show

Json = dict[str, Any]

#: What a status of version 1 starts with, and the state it means.
_STATES = {
    "built, not run": EngineState.BUILT,
    "to be built on the board": EngineState.ON_BOARD,
    "IR only: compiled by the NPU's driver on first use": EngineState.AT_FIRST_USE,
}

#: Said of every engine whose device was in the build machine, whether it ran or not.
_RUNS = ("runs here", "built here, and this machine's GPU can run it")

#: How version 1 called the built engine among the backends it compared.
_AS_BUILT = ", as built"


def from_version_1(data: Mapping[str, Any]) -> Json:
    """A manifest of version 1 without its ``schema_version``, as version 2. What is of the wrong type stays so."""
    _refuse(data, "", "provenance")
    upgraded: Json = dict(data)
    tasks = upgraded.get("tasks")
    entries = [entry for entry in tasks.values() if isinstance(entry, Mapping)] if isinstance(tasks, Mapping) else []
    checked = any(isinstance(entry.get("accuracy"), Mapping) for entry in entries)
    text = upgraded.get("text")
    if isinstance(text, Mapping) and "engine" in text:
        upgraded["text"] = {**text, "engine": _engine("text.engine", text["engine"], ran=checked)}
    for part in ("vae_encoder", "vae_decoder"):
        if part in upgraded:
            upgraded[part] = _engine(part, upgraded[part], ran=checked)
    if isinstance(tasks, Mapping):
        upgraded["tasks"] = {name: _task(name, entry) for name, entry in tasks.items()}
    if "extra" in upgraded:
        upgraded["provenance"] = _known(BuildProvenance, upgraded.pop("extra"))
    return upgraded


def _refuse(data: Mapping[str, Any], key: str, *names: str) -> None:
    """``Mismatch`` if an object of version 1 has an entry that only later versions have."""
    for name in names:
        if name in data:
            raise Mismatch(f"{key}.{name}" if key else name, show(data[name]), "no such key in version 1")


def _task(name: str, entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    _refuse(entry, f"tasks.{name}", "provenance")
    upgraded: Json = dict(entry)
    if "engine" in upgraded:
        ran = isinstance(entry.get("accuracy"), Mapping) or any(
            isinstance(backend, str) and backend.endswith(_AS_BUILT) for backend in _backends(entry.get("extra"))
        )
        upgraded["engine"] = _engine(f"tasks.{name}.engine", upgraded["engine"], ran=ran)
    if "extra" in upgraded:
        upgraded["provenance"] = _known(TaskProvenance, upgraded.pop("extra"))
    return upgraded


def _backends(extra: Any) -> Iterator[Any]:
    """Names of the backends that ran a task's graph."""
    parity = extra.get("parity") if isinstance(extra, Mapping) else None
    rows = parity.get("rows") if isinstance(parity, Mapping) else None
    yield from (row.get("backend") for row in rows or () if isinstance(row, Mapping)) if isinstance(rows, list) else ()


def _engine(key: str, engine: Any, *, ran: bool) -> Any:
    """An entry of an engine; ``ran`` says that it was measured on its device, if that was in the build machine."""
    if not isinstance(engine, Mapping):
        return engine
    _refuse(engine, key, "state", "reason")
    upgraded: Json = dict(engine)
    status = upgraded.pop("status", "")
    if not isinstance(status, str):
        return {**upgraded, "state": status}  # refused by its name
    state, reason = _state(status, ran)
    upgraded |= {"state": state.value, "reason": reason}
    if isinstance(upgraded.get("estimate"), Mapping):
        upgraded["estimate"] = _known(Estimate, upgraded["estimate"])
    return upgraded


def _state(status: str, ran: bool) -> tuple[EngineState, str | None]:
    if status in _RUNS:
        return (EngineState.MEASURED if ran else EngineState.BUILT), None
    for sentence, state in _STATES.items():
        if status.startswith(sentence):
            return state, status.removeprefix(sentence).lstrip(":; ") or None
    return EngineState.UNKNOWN, status or None


def _known(kind: Any, value: Any) -> Any:
    """``value`` without the entries that the dataclasses of ``kind`` do not have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if not isinstance(value, (Mapping, list)):
        return value
    if origin in (Annotated, Union, UnionType):  # of a union, here always that of something and null
        return _known(arguments[0], value)
    if isinstance(value, Mapping):
        if is_dataclass(kind) and isinstance(kind, type):
            types = field_types(kind)
            return {name: _known(types[name], item) for name, item in value.items() if name in types}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {name: _known(arguments[1], item) for name, item in value.items()}
    elif origin is tuple and arguments[-1] is Ellipsis:
        return [_known(arguments[0], item) for item in value]
    return value
