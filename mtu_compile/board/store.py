"""A board's versions of its bundle, side by side, and the link that says which of them runs.

``
ROOT/
  lock                       held by who changes anything; the kernel lets go of it when its holder dies
  trusted/                   keys the board was given, and the highest release it ever ran
  objects/<sha256>           every file that arrived, by content: what two versions have in common is there once
  incoming/<sha256>          what is arriving; a transfer that was cut goes on where it stopped
  environments/<id>/site/    unpacked wheels
  versions/<id>/bundle/      a bundle, of hard links into ``objects``; ``<id>`` is the SHA-256 of its manifest
  versions/<id>/record.json  how far it got
  versions/<id>/built.json   hashes of what was built and compiled of it here; nothing else of ``built/`` is run
  versions/<id>/mtu-compile  the command line of its environment
  current -> versions/<id>   the version that runs; switched by one rename, and nothing else is the switch
``

A process may die at any point of any method here: what it left is either found and used by the next one, or lies under
a name that begins with a dot, and is removed by it. Python's own library alone.
"""

from __future__ import annotations

import fcntl
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mtu_compile import bundle
from mtu_compile.board import durable, record
from mtu_compile.board.record import Record, State
from mtu_compile.bundle import BUILT, MANIFEST, SIGNATURE, Manifest, vouched
from mtu_compile.core.claims import remove
from mtu_compile.core.errors import BundleError, DeployError
from mtu_compile.core.hashing import file_sha256

CURRENT = "current"

_READ_ONLY = 0o444


class Store:
    """The versions under one root folder, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.incoming = root / "incoming"
        self.environments = root / "environments"
        self.versions = root / "versions"
        for folder in (self.objects, self.incoming, self.environments, self.versions):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Be the only one that changes anything; what dead ones left unfinished is removed first.

        Args:
            wait: seconds to wait for another one.

        Raises:
            DeployError: another one is at it.
        """
        with (self.root / "lock").open("a") as lock:
            until = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() >= until:
                        raise DeployError(
                            "another deployment to this board is running", hint="wait for it to end, and try again"
                        ) from None
                    time.sleep(0.1)
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what begins with a dot: only the holder of the lock makes such names."""
        versions = self._version_folders()
        folders = (self.root, self.objects, self.incoming, self.environments, self.versions, *versions)
        for folder in (*folders, self.root / "agent", self.root / "trusted", *(one / "offer" for one in versions)):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name.startswith("."):
                    remove(path)

    # -- objects

    def object(self, sha256: str) -> Path:
        """Where the file of that content is, or would be."""
        return self.objects / sha256

    def missing(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Of contents by their sizes, those that are not here, and the bytes of each that arrived already.

        What is here is read again: a file whose bytes a failing disk changed has to travel anew.
        """
        wanted = {}
        for sha256 in sizes:
            path = self.object(sha256)
            if path.is_file():
                if file_sha256(path) == sha256:
                    continue
                path.unlink()
            arrived = self.incoming / sha256
            wanted[sha256] = arrived.stat().st_size if arrived.is_file() else 0
        return wanted

    def accept(self, sha256: str) -> None:
        """Take what arrived under ``sha256``, if its content is what its name says.

        Raises:
            DeployError: it is something else. It is removed, so that the next transfer begins anew.
        """
        arrived = self.incoming / sha256
        if self.object(sha256).is_file():
            arrived.unlink(missing_ok=True)
            return
        if not arrived.is_file() or arrived.is_symlink():
            raise DeployError(f"{sha256} has not arrived")
        found = file_sha256(arrived)
        if found != sha256:
            arrived.unlink()
            raise DeployError(f"what arrived as {sha256[:12]} has the hash {found[:12]}", hint="deploy again")
        durable.sync_file(arrived)
        arrived.chmod(_READ_ONLY)
        durable.rename(arrived, self.object(sha256))

    # -- versions

    def _version_folders(self) -> list[Path]:
        return [path for path in self.versions.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def ids(self) -> tuple[str, ...]:
        """The versions that are here, those that were active first, in the order they last became so."""
        found = {path.name: self.record(path.name) for path in self._version_folders()}
        return tuple(sorted(found, key=lambda one: (found[one].sequence is None, found[one].sequence or 0, one)))

    def record(self, version: str) -> Record:
        """What is known of a version; a fresh record where nothing is."""
        return record.read(self.versions / version) or Record()

    def keep(self, version: str, changed: Record) -> Record:
        """Keep ``changed`` as what is known of the version."""
        record.write(self.versions / version, changed)
        return changed

    def bundle(self, version: str) -> Path:
        """The bundle's folder of a version."""
        return self.versions / version / "bundle"

    def offered(self, version: str) -> Path:
        """The folder of the manifest (and signature) of a version, as they came."""
        return self.versions / version / "offer"

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version that was offered."""
        return bundle.read(self.offered(version), verify=False)

    def offer(self, version: str, offered: Path, described: Record) -> Record:
        """Begin a version, or go on with one.

        Args:
            version: SHA-256 of the manifest.
            offered: folder of its ``manifest.json`` and, if it is signed, ``signature.json``, which were verified.
            described: what these say.
        """
        folder = self.versions / version
        (folder / "offer").mkdir(parents=True, exist_ok=True)
        for path in (offered / MANIFEST, offered / SIGNATURE):
            if path.is_file():
                durable.write(folder / "offer" / path.name, path.read_bytes())
        durable.sync_folder(self.versions)
        known = record.read(folder)
        if known is None:
            return self.keep(version, described)
        known = replace(known, source=described.source, target=described.target, precision=described.precision)
        if described.release is not None:
            known = replace(known, release=described.release, key=described.key)
        return self.keep(version, known)

    def unpack(self, version: str) -> Record:
        """Assemble a version's bundle beside those that are here; one that is there already is mended where it differs.

        Raises:
            DeployError: a file of it has not arrived.
            OSError: no space left on the disk; nothing is left of what was begun.
        """
        folder, manifest = self.versions / version, self.manifest(version)
        for name, sha256 in manifest.files.items():
            if not self.object(sha256).is_file():
                raise DeployError(f"{name} has not arrived", hint="deploy again")
        if self.bundle(version).is_dir():
            self._mend(version, manifest)
        else:
            partial = folder / ".bundle.partial"
            durable.remove(partial)
            try:
                for name, sha256 in manifest.files.items():
                    path = partial / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.hardlink_to(self.object(sha256))
                self._copy_offer(version, partial)
                durable.sync_tree(partial)
                durable.rename(partial, self.bundle(version))
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return self.keep(version, self.record(version).reached(State.UNPACKED))

    def _mend(self, version: str, manifest: Manifest) -> None:
        """File by file, so that a version that runs meanwhile is whole at every moment."""
        root = self.bundle(version)
        for name, sha256 in manifest.files.items():
            with suppress(OSError, BundleError):
                if file_sha256(bundle.resolve(root, name)) == sha256:
                    continue
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.link(self.object(sha256), path, via=self.versions / version)
        for path in sorted(root.rglob("*"), reverse=True):
            name = path.relative_to(root).as_posix()
            foreign = name.split("/")[0] != BUILT and name not in manifest.files and name not in (MANIFEST, SIGNATURE)
            if foreign and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        self._copy_offer(version, root)
        durable.sync_tree(root)

    def _copy_offer(self, version: str, root: Path) -> None:
        for name in (MANIFEST, SIGNATURE):
            source = self.offered(version) / name
            if source.is_file() and not ((root / name).is_file() and (root / name).read_bytes() == source.read_bytes()):
                durable.write(root / name, source.read_bytes(), via=self.versions / version)

    def equip(self, version: str, environment: str, python: str) -> Record:
        """Say which environment a version runs with, and put its command line beside it."""
        script = (
            "#!/bin/sh\n# mtu-compile with the packages that came with this bundle\n"
            'here=$(dirname "$(readlink -f "$0")")\n'
            f'PYTHONPATH="$here/../../environments/{environment}/site" exec {shlex.quote(python)} -m mtu_compile "$@"\n'
        )
        durable.write(self.versions / version / "mtu-compile", script.encode(), 0o755)
        return self.keep(version, replace(self.record(version).reached(State.INSTALLED), environment=environment))

    # -- what was built here

    def distrust(self, version: str) -> None:
        """Remove what was built or compiled of a version, and is not as it was then: it is made again."""
        try:
            changed = vouched.foreign(self.bundle(version))
        except BundleError:  # the list itself is damaged
            changed = tuple(vouched.there(self.bundle(version)).values())
            (self.versions / version / vouched.FILE).unlink()
        for path in changed:
            remove(path)

    def vouch(self, version: str, built: Mapping[str, str]) -> None:
        """Keep the hashes of what was built here, so that nothing else is ever run.

        Args:
            version: of which.
            built: of engines that were built a moment ago, SHA-256 by path relative to the bundle. What the list has
                already stays as it is there; what is new beside that (a runtime's own cache) is added.
        """
        root = self.bundle(version)
        known = vouched.read(root) or {}
        files = {}
        for name, path in vouched.there(root).items():
            durable.sync_file(path)
            files[name] = built.get(name) or known.get(name) or file_sha256(path)
        durable.write(self.versions / version / vouched.FILE, vouched.to_bytes(files))

    def check_built(self, version: str) -> None:
        """``BundleError`` if an engine of the version is not the one that was built and proven here."""
        if problem := vouched.problem(self.bundle(version)):
            raise BundleError(
                f"version {version[:12]} is not run: {problem}",
                hint="deploy it again: what is not as it was built there is built again",
            )

    # -- which one runs

    @property
    def current(self) -> str | None:
        """The version that is active; ``None`` if none is."""
        try:
            name = (self.root / CURRENT).readlink().name
        except OSError:
            return None
        return name if self.bundle(name).is_dir() else None

    @property
    def previous(self) -> str | None:
        """The version that a rollback goes back to; ``None`` if there is none."""
        active = self.current
        before = None if active is None else self.record(active).before
        return before if before is not None and self.bundle(before).is_dir() else None

    def activate(self, version: str) -> None:
        """Make a version that was proven the one that runs, by one rename.

        Raises:
            DeployError: it was not proven on this board.
            BundleError: an engine of it was changed since.
        """
        known = self.record(version)
        if known.state is not State.CHECKED or known.failures or not self.bundle(version).is_dir():
            why = "; ".join(known.failures) or f"it is {known.state.value}"
            raise DeployError(f"version {version[:12]} was not proven on this board: {why}", hint="deploy it again")
        self.check_built(version)
        active = self.current
        if active == version:
            return
        # Before the switch, which is what makes it true; of a version that is not current nobody asks for these.
        self.keep(version, replace(known, sequence=self._next(), before=active))
        durable.point(self.root / CURRENT, f"versions/{version}")

    def rollback(self) -> tuple[str, str]:
        """Go back to the version that was active before the active one.

        Returns:
            The version that was active, and the one that is.

        Raises:
            DeployError: there is none.
            BundleError: an engine of it was changed since.
        """
        active, before = self.current, self.previous
        if active is None or before is None:
            raise DeployError(
                "there is no version to go back to", hint="`mtu-compile boards status` lists what is there"
            )
        self.check_built(before)
        known = self.record(before)
        self.keep(before, replace(known, sequence=self._next()))
        durable.point(self.root / CURRENT, f"versions/{before}")
        return active, before

    def _next(self) -> int:
        return 1 + max((self.record(one).sequence or 0 for one in self.ids()), default=0)

    def kept(self) -> frozenset[str]:
        """The versions that are never pruned: the active one, what a rollback goes back to, and the last one before."""
        active = self.current
        others = [one for one in self.ids() if one != active and self.record(one).sequence is not None]
        return frozenset(one for one in (active, self.previous, *others[-1:]) if one is not None)

    def prune(self, *, unfinished: bool = True) -> tuple[tuple[str, ...], int]:
        """Remove every version that is not ``kept``, and what only they needed.

        Args:
            unfinished: those that never became active, too, and what has arrived of files so far.

        Returns:
            The versions that were removed, and the bytes that are free now because of it.
        """
        before, kept = shutil.disk_usage(self.root).free, self.kept()
        doomed = [one for one in self.ids() if one not in kept]
        if not unfinished:
            doomed = [one for one in doomed if self.record(one).sequence is not None]
        for one in doomed:
            durable.remove(self.versions / one)
        left = self.ids()
        environments = {self.record(one).environment for one in left}
        for path in self.environments.iterdir():
            if path.name not in environments:
                durable.remove(path)
        wanted = self._wanted(left)
        for path in self.objects.iterdir():
            if path.name not in wanted:
                path.unlink()
        if unfinished:
            for path in self.incoming.iterdir():
                remove(path)
        return tuple(doomed), max(0, shutil.disk_usage(self.root).free - before)

    def _wanted(self, versions: Iterable[str]) -> frozenset[str]:
        """Contents that versions are made of; wheels are not among them once they are unpacked."""
        wanted: set[str] = set()
        for one in versions:
            with suppress(BundleError):
                wanted |= set(self.manifest(one).files.values())
        return frozenset(wanted)
