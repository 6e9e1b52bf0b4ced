"""Where results are kept: a folder with an entry for each, which any number of builds share.

    entries/<step>-<key>/        a result, whole or absent: it is renamed into its place
    locks/<step>-<key>.lock      held by whoever makes or removes it
    leases/<build>/<step>-<key>  a build at work needs it; leases/<build>.lock is held for as long as that build lives
    events/<build>/              what its steps in other processes say of their progress

Locks are the kernel's (``filelock``), and end with the process that holds them: one that is killed blocks nobody. What
it had begun is removed by the next who makes the same.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mtu_compile.core.errors import ModelError, MtuError
from mtu_compile.steps.entry import ENTRY, Damaged, Entry, read_entry

_TAG = "CACHEDIR.TAG"
#: What backup programs leave out (https://bford.info/cachedir/).
_TAGGED = "Signature: 8a477f597d28d172789f06886806bc55\n# results of mtu-compile's builds; may be removed at any time\n"


@dataclass(frozen=True)
class Listed:
    """An entry as ``ls`` shows it.

    Attributes:
        name: of its folder.
        title: what made it; ``None`` for one that is damaged.
        bytes: on the disk.
        used: when it was used last, seconds since 1970.
        in_use: a build at work needs it.
    """

    name: str
    title: str | None
    bytes: int
    used: float
    in_use: bool


class Store:
    """Kept results in ``root``, on behalf of one build or command; a context that ends with its lease.

    Args:
        root: folder, which is made if need be.
        temporary: nobody else uses it, and what is not needed any more is removed at once.
    """

    def __init__(self, root: Path, *, temporary: bool = False) -> None:
        self.root = root.resolve()
        self.temporary = temporary
        self._lease = self.root / "leases" / secrets.token_hex(8)
        #: Where jobs in other processes say how far they are.
        self.events = self.root / "events" / self._lease.name
        self._alive = FileLock(f"{self._lease}.lock")

    def __enter__(self) -> Store:
        try:
            for name in ("entries", "locks", "leases"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._alive.acquire()
            self._lease.mkdir()
            if not (self.root / _TAG).exists():
                (self.root / _TAG).write_text(_TAGGED, encoding="utf-8")
        except OSError as error:
            raise MtuError(
                f"the cache {str(self.root)!r} cannot be written: {error.strerror}",
                hint="choose another with --cache, or build with --no-cache",
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._lease, ignore_errors=True)
        shutil.rmtree(self.events, ignore_errors=True)
        self._alive.release()
        Path(self._alive.lock_file).unlink(missing_ok=True)

    @property
    def lease(self) -> Path:
        """A file that is locked for as long as this store is open, by which others see whether its build lives."""
        return Path(self._alive.lock_file)

    @property
    def build(self) -> str:
        """What this build or command is told from others by."""
        return self._lease.name

    def folder(self, name: str) -> Path:
        """Where the entry called ``name`` is, if it is."""
        return self.root / "entries" / name

    def find(self, name: str) -> Entry | None:
        """The entry, which stays for as long as this store is open; ``None`` if there is none, or it is being made."""
        with _if_free(self._lock(name)) as ours:
            return self._read(name) if ours else None

    def wait_for(self, name: str) -> Entry | None:
        """As ``find``, after whoever makes, reads or removes the entry at this moment has done so."""
        with self._lock(name):
            return self._read(name)

    @contextmanager
    def making(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Entry | Path]:
        """The entry, if somebody else has made it; else a folder, which is the entry when the block ends well.

        Args:
            waiting: called if somebody is just making it, before that is waited for.
        """
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            if (entry := self._read(name)) is not None:
                yield entry
                return
            partial = self.root / "entries" / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed: the lock is ours
            partial.mkdir()
            try:
                yield partial
                if not (partial / ENTRY).is_file():
                    raise AssertionError("nothing was made")
                partial.rename(self.folder(name))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            lock.release()

    def remove(self, name: str) -> None:
        """Remove an entry, as one that is damaged."""
        with self._lock(name):
            self._discard(name)

    def ls(self) -> list[Listed]:
        """What is kept, the least recently used first."""
        needed, found = self._needed(), []
        for folder in (self.root / "entries").glob("[!.]*"):
            with suppress(OSError):  # removed meanwhile
                used = (folder / ENTRY).stat().st_mtime if (folder / ENTRY).exists() else 0.0
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                found.append(Listed(folder.name, _title(folder), size, used, folder.name in needed))
        return sorted(found, key=lambda one: (one.used, one.name))

    def prune(self, limit: int) -> list[Listed]:
        """Remove the least recently used until at most ``limit`` bytes are left, but nothing that a build needs.

        What is damaged or half made by a process that is dead goes, too.

        Returns:
            What was removed.
        """
        self._clear_dead()
        listed, removed = self.ls(), list[Listed]()
        total = sum(one.bytes for one in listed)
        for one in listed:
            if one.title is not None and total <= limit:
                continue
            if self._remove_unneeded(one.name):
                total -= one.bytes
                removed.append(one)
        return removed

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.root / "locks" / f"{name}.lock")

    def _read(self, name: str) -> Entry | None:
        """The entry, marked as used; removed if it is damaged. The lock is held."""
        if not self.temporary:
            (self._lease / name).touch()
        if not self.folder(name).exists():
            return None
        try:
            entry = read_entry(self.folder(name))
            os.utime(entry.folder / ENTRY)
        except (Damaged, ModelError, OSError):
            self._discard(name)
            return None
        return entry

    def _discard(self, name: str) -> None:
        """Remove an entry so that nobody sees half of it. The lock is held."""
        away = self.root / "entries" / f".{name}.removed"
        shutil.rmtree(away, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder(name).rename(away)
        shutil.rmtree(away, ignore_errors=True)

    def _remove_unneeded(self, name: str) -> bool:
        with _if_free(self._lock(name)) as ours:
            # asked only now: a build marks what it needs under the same lock
            if not ours or name in self._needed():
                return False
            self._discard(name)
            return True

    def _needed(self) -> set[str]:
        """Names of what builds at work need."""
        return {path.name for lease in (self.root / "leases").iterdir() if lease.is_dir() for path in lease.iterdir()}

    def _clear_dead(self) -> None:
        """Remove what processes that are dead left: leases, and what they had begun."""
        for place in (self.root / "leases").glob("*.lock"):
            with _if_free(FileLock(place)) as ours:
                if ours:
                    shutil.rmtree(place.with_suffix(""), ignore_errors=True)
                    shutil.rmtree(self.root / "events" / place.stem, ignore_errors=True)
            if ours:
                place.unlink(missing_ok=True)
        for half in (self.root / "entries").glob(".*"):
            name = half.name[1:].rpartition(".")[0]
            with _if_free(self._lock(name)) as ours:
                if ours:
                    shutil.rmtree(half, ignore_errors=True)


@contextmanager
def _if_free(lock: FileLock) -> Iterator[bool]:
    """Hold ``lock`` for the block, unless somebody else does; whether it is ours."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _title(folder: Path) -> str | None:
    try:
        return read_entry(folder).title
    except (Damaged, ModelError):
        return None
