"""Reading, verifying and writing a bundle's folder: nothing is opened before its name is known to be harmless."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtu_compile.bundle.manifest import BUILT, MANIFEST, Manifest, check_relative
from mtu_compile.core.errors import BundleError
from mtu_compile.core.files import what_else
from mtu_compile.core.hashing import file_sha256
from mtu_compile.core.schema import parse_json

#: The manifest's own hash: SHA-256 of the file as it would be without this entry.
SELF_HASH = "manifest_sha256"
_MANIFEST_LIMIT = 64 << 20  # bytes; a manifest has kilobytes, so anything near this is not one
_GET_AGAIN = "the bundle was changed or damaged after it was built; copy it again, or rebuild it"


def read(path: Path | str, verify: bool = True) -> Manifest:
    """The manifest of the bundle at ``path``.

    Args:
        path: the bundle's folder.
        verify: compare every file (and the manifest) with its recorded hash. Without it only the manifest is read
            and checked for sense, for a developer who edits a bundle by hand.

    Raises:
        BundleError: no bundle there, an unknown schema version, or any byte or file changed, missing or added.
    """
    root = Path(path)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise BundleError(f"bundle {str(root)!r} {problem}", hint="name the folder that mtu-compile wrote")
    file = root / MANIFEST
    if not file.is_symlink() and not file.exists():
        raise BundleError(f"{str(root)!r} has no {MANIFEST}", hint="name the folder that mtu-compile wrote")
    _regular_file(file, MANIFEST)
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{MANIFEST} is {file.stat().st_size} bytes long, which no manifest is", hint=_GET_AGAIN)
    content = file.read_bytes()
    try:
        raw = parse_json(content.decode())
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON: {error}", hint=_GET_AGAIN) from error
    if not isinstance(raw, dict):
        raise BundleError(f"{MANIFEST} is not a JSON object", hint=_GET_AGAIN)
    recorded = raw.pop(SELF_HASH, None)
    manifest = Manifest.from_json(raw)  # first, so that another schema version is called by its name
    if verify and content != _sealed(raw):
        detail = "has no hash of itself" if recorded is None else "does not agree with its own hash"
        raise BundleError(f"{MANIFEST} {detail}", hint=_GET_AGAIN)
    manifest.check()
    if verify:
        verify_files(root, manifest)
    return manifest


def verify_files(path: Path | str, manifest: Manifest) -> None:
    """``BundleError`` with the file's name if the folder differs from ``manifest.files`` in any file or byte."""
    root = Path(path)
    found = set(_scan(root)) - {MANIFEST}
    for name in sorted(manifest.files.keys() - found):
        raise BundleError(f"{name} is missing from the bundle", hint=_GET_AGAIN)
    for name in sorted(found - manifest.files.keys()):
        raise BundleError(f"{name} does not belong to the bundle", hint="remove it, or get the bundle again")
    for name, recorded in manifest.files.items():
        if file_sha256(resolve(root, name)) != recorded:
            raise BundleError(f"{name} is not the file the bundle was built with", hint=_GET_AGAIN)


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of ``folder`` and write its ``manifest.json``; the manifest as written.

    Raises:
        BundleError: the manifest contradicts itself, or names a file that is not there.
    """
    files = {name: file_sha256(folder / name) for name in sorted(_scan(folder)) if name != MANIFEST}
    complete = replace(manifest, files=files)
    complete.check()
    content = _sealed(complete.to_json())
    Manifest.from_json({k: v for k, v in json.loads(content).items() if k != SELF_HASH})  # it has to be readable
    (folder / MANIFEST).write_bytes(content)
    return complete


def resolve(root: Path | str, name: str) -> Path:
    """The path of the bundle's file ``name``; ``BundleError`` if it is not a regular file inside the bundle."""
    check_relative(name, "a path")
    path = Path(root)
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            break
    _regular_file(path, name)
    return path


def _sealed(raw: Mapping[str, Any]) -> bytes:
    """The one and only form of a manifest: readable, and any byte of it changed is seen."""
    body = {key: value for key, value in raw.items() if key != SELF_HASH}
    digest = hashlib.sha256(_dump(body)).hexdigest()
    return _dump({**body, SELF_HASH: digest})


def _dump(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2, ensure_ascii=True).encode() + b"\n"


def _scan(root: Path) -> Iterator[str]:
    """Relative names of all files under ``root``; links are never followed, anything but a plain file is refused.

    What this machine built from the bundle (``BUILT``) is not the bundle's: it has an index of its own.
    """
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if name != BUILT:
                        folders.append(name + "/")
                else:
                    _regular_file(Path(entry.path), name)
                    yield name


def _regular_file(path: Path, name: str) -> None:
    try:
        kind = what_else(path)
    except OSError as error:
        raise BundleError(f"{name} is missing from the bundle", hint=_GET_AGAIN) from error
    if kind is not None:
        raise BundleError(f"{name} is {kind}; a bundle holds only plain files", hint=_GET_AGAIN)
