"""A folder of calibration sets: one file a task, and ``set.json``, which says what is in them and what else is there.

``set.json`` holds nothing that the sets do not say themselves, but for the hash of ``ranges.json``. So it is read to
learn which files belong together, and is refused where it says anything else than they do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.sets import CAPTURE_HINT, CalibrationSet
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.files import what_else
from mtu_compile.core.hashing import file_sha256

INDEX = "set.json"
RANGES = "ranges.json"
FORMAT = "mtu-calibration-folder-1"

#: Bytes; an index has kilobytes.
_INDEX_LIMIT = 16 << 20


def write_folder(folder: Path, sets: Mapping[str, CalibrationSet], ranges: Mapping[str, Any] | None = None) -> None:
    """Write ``sets``, by task and of one model, into the empty ``folder``; equal sets give equal files.

    Args:
        folder: a staging folder (``mtu_compile.core.atomic.staging``): this is not atomic by itself.
        sets: at least one.
        ranges: what ``calibration.shared_scales.to_json`` made of them.
    """
    for task, made in sets.items():
        made.save(folder / _file(task))
    if ranges is not None:
        (folder / RANGES).write_text(json.dumps(ranges, indent=1) + "\n", encoding="utf-8")
    index = folder / INDEX
    index.write_text(json.dumps(_index(folder, sets), indent=2) + "\n", encoding="utf-8")
    for task in sets:
        (folder / _file(task)).chmod(index.stat().st_mode)  # safetensors writes for its owner alone


def load_folder(folder: Path) -> dict[str, CalibrationSet]:
    """The sets in ``folder``, by task, each the very data its hash and ``set.json`` speak of.

    Whether they are of a certain model, and real, is for ``CalibrationSet.verify``.

    Raises:
        CalibrationError: no such folder, a file that is missing, changed, a link, or does not belong to it.
    """
    index = _read_index(folder)
    tasks = index.get("tasks")
    if index.get("format") != FORMAT:
        raise CalibrationError(f"{folder / INDEX} is not of this version ({FORMAT})", hint=CAPTURE_HINT)
    if not isinstance(tasks, dict) or not tasks:
        raise CalibrationError(f"{folder / INDEX} names no tasks", hint=CAPTURE_HINT)
    for task in tasks:
        if not task.replace("-", "").replace("_", "").isalnum():  # as mtu_compile.core.tasks.Task demands
            raise CalibrationError(
                f"{folder / INDEX} names a task {task!r}, which is no name of one", hint=CAPTURE_HINT
            )
    expected = {INDEX, *map(_file, tasks), *({RANGES} if index.get("ranges") is not None else ())}
    found = {path.name for path in folder.iterdir()}
    for name in sorted(expected - found):
        raise CalibrationError(f"{folder / name} is missing", hint=CAPTURE_HINT)
    for name in sorted(found - expected):
        raise CalibrationError(f"{folder / name} does not belong to the calibration set", hint="remove it")
    for name in sorted(expected):
        _plain_file(folder / name)
    sets = {task: CalibrationSet.load(folder / _file(task)) for task in tasks}
    for task, loaded in sets.items():
        if loaded.task != task:
            raise CalibrationError(f"{folder / _file(task)} is for task {loaded.task!r}", hint=CAPTURE_HINT)
    if index != _index(folder, sets):
        raise CalibrationError(f"{folder / INDEX} does not say what is in the folder", hint=CAPTURE_HINT)
    return sets


def set_file(folder: Path, task: str) -> Path:
    """Where the set of a task is in ``folder``."""
    return folder / _file(task)


def _file(task: str) -> str:
    return f"{task}.safetensors"


def _index(folder: Path, sets: Mapping[str, CalibrationSet]) -> dict[str, Any]:
    """What ``set.json`` has to say of ``sets``, in a form that JSON gives back unchanged."""
    models = {made.model_sha256 for made in sets.values()}
    if len(models) != 1:
        raise CalibrationError(f"the calibration sets in {folder} are of different models", hint=CAPTURE_HINT)
    ranges = folder / RANGES
    return {
        "format": FORMAT,
        "model_sha256": models.pop(),
        "tasks": {
            task: {
                "file": _file(task),
                **made.describe(),
                "timesteps": [[t, n] for t, n in sorted(Counter(map(float, made.timesteps)).items(), reverse=True)],
                "size": [int(side) for side in made.size],
            }
            for task, made in sets.items()
        },
        "ranges": {"file": RANGES, "sha256": file_sha256(ranges)} if ranges.exists() else None,
    }


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise CalibrationError(f"calibration set {str(folder)!r} {problem}", hint=CAPTURE_HINT)
    path = folder / INDEX
    _plain_file(path)
    if path.stat().st_size > _INDEX_LIMIT:
        raise CalibrationError(f"{path} is {path.stat().st_size} bytes long, which no index is", hint=CAPTURE_HINT)
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}", hint=CAPTURE_HINT) from error
    if not isinstance(index, dict):
        raise CalibrationError(f"{path} is not a JSON object", hint=CAPTURE_HINT)
    return index


def _plain_file(path: Path) -> None:
    try:
        kind = what_else(path)
    except OSError as error:
        raise CalibrationError(f"{path} is missing", hint=CAPTURE_HINT) from error
    if kind is not None:
        raise CalibrationError(f"{path} is {kind}; a calibration set holds only plain files", hint=CAPTURE_HINT)
