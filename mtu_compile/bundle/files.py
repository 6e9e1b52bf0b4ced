"""Reading, verifying and writing a bundle's folder: nothing is opened before its name is known to be harmless."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtu_compile.bundle import signature
from mtu_compile.bundle.manifest import BUILT, MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, Manifest, check_relative
from mtu_compile.bundle.plain import GET_AGAIN, plain_sha256, read_small, regular_file
from mtu_compile.core.errors import BundleError
from mtu_compile.core.schema import parse_json

if TYPE_CHECKING:
    from mtu_compile.bundle.keys import PublicKey

#: The manifest's own hash: SHA-256 of the file as it would be without this entry.
SELF_HASH = "manifest_sha256"
#: Files that the manifest does not list: itself, and what vouches for it.
OWN = frozenset({MANIFEST, SIGNATURE})
#: Values in a manifest: real ones have some thousands. Python takes 100 bytes for one of which JSON has 2.
_MOST_VALUES = 1_000_000


def read(path: Path | str, verify: bool = True, trusted: Sequence[PublicKey] | None = None) -> Manifest:
    """The manifest of the bundle at ``path``.

    Args:
        path: the bundle's folder.
        verify: compare every file (and the manifest) with its recorded hash. Without it only the manifest is read
            and checked for sense, for a developer who edits a bundle by hand.
        trusted: demand a signature by one of these keys, before anything of the bundle is parsed.

    Raises:
        BundleError: no bundle there, an unknown schema version, any byte or file changed, missing or added; or not
            signed by anybody trusted, or lying where everybody can change it after it was read.
    """
    root = Path(path)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise BundleError(f"bundle {str(root)!r} {problem}", hint="name the folder that mtu-compile wrote")
    file = root / MANIFEST
    if not file.is_symlink() and not file.exists():
        raise BundleError(f"{str(root)!r} has no {MANIFEST}", hint="name the folder that mtu-compile wrote")
    content, signed = read_small(file, MANIFEST, MOST_MANIFEST_BYTES), signature.read_signature(root)
    if trusted is not None:
        signature.verify_bytes(content, signed, trusted)
    elif verify and signed is not None:
        signature.parse(content, signed)
    manifest = parse(content, verify=verify)
    if verify:
        verify_files(root, manifest)
        if trusted is not None:
            _check_writers(root, manifest)
    return manifest


def read_to_sign(path: Path) -> Manifest:
    """``read`` of a bundle that is to be signed: a signature of what it was before may lie there."""
    manifest = parse(read_small(path / MANIFEST, MANIFEST, MOST_MANIFEST_BYTES))
    verify_files(path, manifest)
    return manifest


def parse(content: bytes, verify: bool = True) -> Manifest:
    """What the bytes of a manifest say, which were not found to be anybody's yet; raises as ``read``."""
    if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise BundleError(f"{MANIFEST} has more than {_MOST_VALUES} values, which no manifest has", hint=GET_AGAIN)
    try:
        raw = parse_json(content.decode(), strict_keys=True)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON: {error}", hint=GET_AGAIN) from error
    if not isinstance(raw, dict):
        raise BundleError(f"{MANIFEST} is not a JSON object", hint=GET_AGAIN)
    recorded = raw.pop(SELF_HASH, None)
    manifest = Manifest.from_json(raw)  # first, so that another schema version is called by its name
    if verify and content != _sealed(raw):
        detail = "has no hash of itself" if recorded is None else "does not agree with its own hash"
        raise BundleError(f"{MANIFEST} {detail}", hint=GET_AGAIN)
    manifest.check()
    return manifest


def verify_files(path: Path | str, manifest: Manifest) -> None:
    """``BundleError`` with the file's name if the folder differs from ``manifest.files`` in any file or byte."""
    root = Path(path)
    found = set(_scan(root)) - OWN
    for name in sorted(manifest.files.keys() - found):
        raise BundleError(f"{name} is missing from the bundle", hint=GET_AGAIN)
    for name in sorted(found - manifest.files.keys()):
        raise BundleError(f"{name} does not belong to the bundle", hint="remove it, or get the bundle again")
    for name, recorded in manifest.files.items():
        if plain_sha256(resolve(root, name), name) != recorded:
            raise BundleError(f"{name} is not the file the bundle was built with", hint=GET_AGAIN)


def _check_writers(root: Path, manifest: Manifest) -> None:
    """``BundleError`` if everybody may change a file or folder: engines are opened later than their hashes are read."""
    if os.name != "posix":
        return
    inner = {parent for name in manifest.files for parent in (root / name).parents if parent.is_relative_to(root)}
    for place in sorted({root, *inner, *(root / name for name in (MANIFEST, SIGNATURE, *manifest.files))}):
        if place.lstat().st_mode & stat.S_IWOTH:
            raise BundleError(
                f"{str(place)!r} can be changed by everybody on this machine, so its signature says nothing",
                hint=f"chmod -R o-w {root}",
            )


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of ``folder`` and write its ``manifest.json``; the manifest as written.

    A signature of what the bundle was before is removed.

    Raises:
        BundleError: the manifest contradicts itself, or names a file that is not there.
    """
    files = {name: plain_sha256(folder / name, name) for name in sorted(_scan(folder)) if name not in OWN}
    complete = replace(manifest, files=files)
    complete.check()
    content = _sealed(complete.to_json())
    Manifest.from_json({k: v for k, v in json.loads(content).items() if k != SELF_HASH})  # it has to be readable
    (folder / SIGNATURE).unlink(missing_ok=True)
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
    regular_file(path, name)
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
                    regular_file(Path(entry.path), name)
                    yield name
