"""Writing a folder or a file all at once: it is either there and whole, or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mtu_compile.core.claims import OLD, claim, sweep
from mtu_compile.core.errors import ConfigError, MtuError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside ``path``, of the same suffix, that becomes ``path`` when the block ends well.

    On any error, Ctrl-C included, what was written there is removed and ``path`` is as it was. What a killed process
    left there is removed by the next that writes ``path``.
    """
    with claim(path) as stem:
        temporary = stem.with_name(f"{stem.name}{path.suffix}")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def scratch(name: str, beside: Path | None = None) -> Iterator[Path]:
    """A folder in the system's place for temporary files, or in ``beside``, for as long as the block runs.

    What a killed process left there is removed by the next one that asks for the same ``name``.
    """
    with claim((beside or Path(tempfile.gettempdir())) / name) as stem:
        folder = stem.with_name(f"{stem.name}.scratch")
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging(destination: Path | str, *, replace: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A new folder beside ``destination`` that becomes ``destination`` when the block ends well.

    On any error, Ctrl-C included, the folder is removed and ``destination`` is as it was. What a killed process left
    there is removed by the next that writes ``destination``, and with it all whose name begins with the folder's.

    Args:
        destination: must not exist, unless ``replace``.
        replace: an existing folder is kept until the new one is in its place.
        marker: only a folder that holds this file (or nothing) is replaced, so that a mistyped output path cannot
            cost a folder that is no product of this tool. Without it, only an empty folder is.

    Raises:
        ConfigError: ``destination`` exists and is not to be replaced.
        MtuError: the disk is full, or the place cannot be written.
    """
    # realpath: a link to a bundle stays a link, and what it points to is replaced
    target = Path(os.path.realpath(destination))
    sweep(target)  # first: it may put back what was there
    _check_free(target, replace, marker)
    created: list[Path] = []
    with ExitStack() as stack:
        try:
            temporary = _make_folder(target, created, stack)
            yield temporary
            _move_into_place(temporary, target, replace, marker)
        except BaseException as error:
            stack.close()
            for parent in reversed(created):
                _remove_if_empty(parent)
            if _is_full_disk(error):
                raise MtuError(
                    f"no space left on the disk while writing {str(target)!r}",
                    hint="free some space, or choose another place with -o; nothing was left behind",
                ) from error
            raise


def check_free(destination: Path | str, *, replace: bool = False, marker: str | None = None) -> None:
    """Raise, before long work, what ``staging`` would raise of ``destination``."""
    target, created = Path(os.path.realpath(destination)), list[Path]()
    sweep(target)
    _check_free(target, replace, marker)
    with ExitStack() as stack:
        _make_folder(target, created, stack)
    for parent in reversed(created):
        _remove_if_empty(parent)


def _check_free(target: Path, replace: bool, marker: str | None) -> None:
    if not target.exists():
        return
    if not replace:
        raise ConfigError(f"{str(target)!r} already exists", hint="choose another place, or pass --force to replace it")
    if target.is_dir() and not any(target.iterdir()):
        return
    if marker is None:
        raise ConfigError(f"{str(target)!r} already exists", hint="choose another place, or remove it yourself")
    if not (target / marker).is_file():
        raise ConfigError(
            f"{str(target)!r} is not something mtu-compile wrote (it has no {marker}), so it is not replaced",
            hint="choose another place, or remove it yourself",
        )


def _move_into_place(temporary: Path, target: Path, replace: bool, marker: str | None) -> None:
    _check_free(target, replace, marker)  # again: it may have appeared while the folder was filled
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(OLD)
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    # under another name, as a folder that is half removed must not be put back
    shutil.rmtree(old.rename(temporary.with_suffix(".removed")), ignore_errors=True)


def _make_folder(target: Path, created: list[Path], stack: ExitStack) -> Path:
    """A new folder beside ``target``, which ``stack`` removes; parents it makes go to ``created``, outermost first."""
    missing, parent = [], target.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for parent in reversed(missing):
            parent.mkdir()
            created.append(parent)
        stem = stack.enter_context(claim(target))
        folder = stem.with_name(f"{stem.name}.partial")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        if _is_full_disk(error):
            raise
        raise MtuError(
            f"cannot write in {str(target.parent)!r}: {error.strerror}", hint="choose another place with -o"
        ) from error
    return folder


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return


def _is_full_disk(error: BaseException) -> bool:
    """Whether the disk was full; libraries in C++ and Rust say so in words instead of an ``errno``."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:  # a library may raise an error from itself
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if isinstance(current, Exception) and "No space left on device" in str(current):
            return True
        current = current.__cause__ or current.__context__
    return False
