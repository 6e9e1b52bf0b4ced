"""Rows of an image folder: ``DIR/<task>/metadata.jsonl`` in Hugging Face's convention, one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import InputError
from mtu_compile.core.schema import Mismatch, conform, parse_json, show

METADATA = "metadata.jsonl"

#: Rows of this split are kept for accuracy checks: neither trained on nor calibrated with.
CHECK_SPLIT = "check"


#: What a row may say of what is used here; other keys are left alone.
KEYS = ("prompt", "file_name", "image_file_name", "mask_file_name", "split")

HINT = 'write rows like {"file_name": "a.png", "prompt": "a cat"}'


@dataclass(frozen=True)
class Row:
    """One example of one task. Paths are absolute, exist, and lie inside the task's folder.

    Attributes:
        place: file and line, for messages.
        prompt: what the picture shows or what to change, ``""`` if the row says nothing.
        target: the wanted picture (``file_name``).
        image: the source picture of an ``image`` condition (``image_file_name``).
        mask: white where to repaint (``mask_file_name``).
        split: ``"check"`` or anything else.
    """

    place: str
    prompt: str = ""
    target: Path | None = None
    image: Path | None = None
    mask: Path | None = None
    split: str | None = None


def parse_row(folder: Path, place: str, data: Mapping[str, Any]) -> Row:
    """Check one JSON object and resolve its paths.

    Raises:
        InputError: a field is not a string, or a file is missing or outside ``folder``.
    """
    try:
        conform(Mapping[str, Any], data)
        for key in KEYS:
            conform(str | None, data.get(key), key)
    except Mismatch as mismatch:
        raise mismatch.at(place, error=InputError, hint=HINT) from mismatch
    return Row(
        place=place,
        prompt=data.get("prompt") or "",
        target=_resolve(folder, place, data.get("file_name")),
        image=_resolve(folder, place, data.get("image_file_name")),
        mask=_resolve(folder, place, data.get("mask_file_name")),
        split=data.get("split"),
    )


def _resolve(folder: Path, place: str, name: str | None) -> Path | None:
    if name is None:
        return None
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, with a zero byte, or links that run in a circle
        inside, there = True, False
    if not inside:
        raise InputError(f"{place}: {show(name)} lies outside {folder}", hint="keep the pictures beside metadata.jsonl")
    if not there:
        raise InputError(f"{place}: there is no file {show(name)} in {folder}")
    return path


def read_rows(folder: Path) -> tuple[Row, ...]:
    """All rows of ``folder/metadata.jsonl``, in file order.

    Raises:
        InputError: the file is missing, empty or not UTF-8 JSON lines, or a row is bad (file and line are named).
    """
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}", hint="one JSON object a line, with file_name and prompt") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            data = parse_json(line)
        except ValueError as error:
            raise InputError(f"{place}: not JSON: {error}") from error
        rows.append(parse_row(folder, place, data))
    if not rows:
        raise InputError(f"{path} has no rows")
    return tuple(rows)
