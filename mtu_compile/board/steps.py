"""What an agent does when it is asked to: a step leaves the board as it was, or further on, and is safe to repeat."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mtu_compile.board import durable, environment, facts, record
from mtu_compile.board.limits import Limits
from mtu_compile.board.record import Record, State
from mtu_compile.board.store import Store
from mtu_compile.board.trusted import Trust
from mtu_compile.bundle import MANIFEST, SIGNATURE
from mtu_compile.core import errors, vendors
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import AccuracyError, BundleError, DeployError, LimitError, MtuError

#: Called with the title of what has begun.
Tell = Callable[[str], None]
#: Called with the process of a step, and with ``None`` when it has ended.
Running = Callable[["subprocess.Popen[str] | None"], None]

#: Bytes that have to stay free on a board's disk, beside all that is estimated: records, logs, what is built.
SPARE = 64 << 20

_STAYS = "the version that was active before still is"


class Steps:
    """The steps on one store, whose lock is held."""

    def __init__(self, store: Store, tell: Tell, running: Running) -> None:
        self.store, self.trust = store, Trust(store)
        self._tell, self._running = tell, running

    # -- what is there

    def status(self) -> dict[str, Any]:
        """The board and its versions."""
        store, highest = self.store, self.trust.highest()
        active, previous = store.current, store.previous
        return {
            "board": facts.gather(store.root),
            "root": str(store.root),
            "active": active,
            "previous": previous,
            "keys": [key.key_id for key in self.trust.given()],
            "highest_release": None if highest is None else highest.release,
            "versions": {one: store.record(one).to_json() for one in store.ids()},
        }

    # -- the steps of a deployment, in their order

    def offer(
        self,
        *,
        manifest: str,
        signature: str | None,
        sizes: Mapping[str, int],
        wheels: Mapping[str, str],
        unsigned: bool,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Judge a manifest by its signature, and say what has to travel.

        Args:
            manifest: the file, as text.
            signature: likewise; ``None`` if the bundle has none.
            sizes: of every file that belongs to the version, by SHA-256: the bundle's and the wheels'.
            wheels: SHA-256 by file name.
            unsigned: see ``Trust.judge``.
            dry_run: nothing of it is kept.

        Raises:
            BundleError: see ``Trust.judge``; or the manifest names a file of which no size is said.
            DeployError: too little space on the disk.
        """
        store = self.store
        content = manifest.encode()
        version = hashlib.sha256(content).hexdigest()
        folder = store.root / ".offered"
        durable.remove(folder)
        folder.mkdir()
        try:
            (folder / MANIFEST).write_bytes(content)
            if signature is not None:
                (folder / SIGNATURE).write_bytes(signature.encode())
            read, signed = self.trust.judge(folder, unsigned=unsigned)
            self.trust.check_wheels(read, wheels)
            for name, sha256 in (*read.files.items(), *wheels.items()):
                if sha256 not in sizes:
                    raise BundleError(f"nobody says how long {name} is")
            missing = store.missing({sha256: sizes[sha256] for sha256 in (*read.files.values(), *wheels.values())})
            wanted = environment.identity(wheels)
            unpacked = 0
            if not (store.environments / wanted).is_dir():
                unpacked = environment.unpacked_bytes({name: sizes[sha256] for name, sha256 in wheels.items()})
            else:  # its wheels are not needed again
                missing = {sha256: got for sha256, got in missing.items() if sha256 in read.files.values()}
            self._check_space(sum(max(0, sizes[one] - got) for one, got in missing.items()) + unpacked)
            if not dry_run:
                described = Record(
                    source=read.source.name,
                    target=read.target,
                    precision=read.precision,
                    release=None if signed is None else signed.release,
                    key=None if signed is None else signed.key_id,
                )
                store.offer(version, folder, described)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        known = store.record(version)
        return {
            "version": version,
            "missing": missing,
            "incoming": str(store.incoming),
            "environment": wanted,
            "environment_there": unpacked == 0,
            "state": known.state.value,
            "active": store.current == version,
        }

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.store.root).free
        if free < needed + SPARE:
            raise DeployError(
                f"the version takes {readable(needed)} more, and {readable(free)} of the board's disk are free",
                hint=f"{readable(SPARE)} are to stay free; `mtu-compile boards prune HOST` removes old versions",
            )

    def accept(self, *, sha256: str) -> dict[str, Any]:
        """Take a file that has arrived, see ``Store.accept``."""
        self.store.accept(sha256)
        return {}

    def unpack(self, *, version: str) -> dict[str, Any]:
        """Assemble the bundle, see ``Store.unpack``."""
        if self.store.record(version).state is State.OFFERED:
            self.store.keep(version, self.store.record(version).reached(State.TRANSFERRED))
        return {"state": self.store.unpack(version).state.value}

    def install(self, *, version: str, wheels: Mapping[str, str]) -> dict[str, Any]:
        """Unpack the packages, and say that the version runs with them."""
        self.trust.check_wheels(self.store.manifest(version), wheels)
        name = environment.identity(wheels)
        there = (self.store.environments / name).is_dir()
        if not there:
            missing = [wheel for wheel, sha256 in wheels.items() if not self.store.object(sha256).is_file()]
            if missing:
                raise DeployError(f"{missing[0]} has not arrived", hint="deploy again")
            self._tell("unpack packages")
        environment.install(self.store, wheels)
        for sha256 in wheels.values():  # unpacked they take enough; a bundle that carries them has links of its own
            if sha256 not in self.store.manifest(version).files.values():
                self.store.object(sha256).unlink(missing_ok=True)
        changed = self.store.record(version).environment not in (None, name)
        if changed:  # what was built and checked was so with other packages
            self.store.keep(version, replace(self.store.record(version), state=State.UNPACKED, figures=None, on=None))
        self.store.equip(version, name, sys.executable)
        return {"environment": name, "was_there": there}

    def build(self, *, version: str) -> dict[str, Any]:
        """Build the engines that only this board can; those that are there and whole stay."""
        kinds = {ref.kind for _, ref in self.store.manifest(version).engines()}
        result: dict[str, Any] = {"engines": [], "notes": []}
        if kinds & vendors.builders().keys():
            self.store.distrust(version)
            result = self._prove("build", version)
            self.store.vouch(version, {one["engine"]: one["engine_sha256"] for one in result["engines"]})
        self.store.keep(version, self.store.record(version).reached(State.BUILT))
        return result

    def check(self, *, version: str, again: bool = False, limits: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Run the version on this board's device; what was measured, which is kept whatever comes of it.

        Args:
            version: to be checked.
            again: although it was checked with these packages on this very board.
            limits: see ``limits.Limits``.

        Raises:
            AccuracyError: below a threshold. The version can then not become active.
            LimitError: too slow or too large for ``limits``; likewise.
            BundleError: an engine was changed since it was built here.
        """
        store, known = self.store, self.store.record(version)
        board = facts.gather(store.root)
        here = facts.identity(board, known.environment or "")
        reused = known.state is State.CHECKED and known.on == here and not known.failures and not again
        store.check_built(version)
        if not reused:
            store.distrust(version)
            # First, so that a version that fails now cannot stay proven: unless it runs, when it has to stay.
            if version != store.current:
                known = store.keep(version, replace(known, state=State.BUILT, figures=None, failures=(), on=None))
            figures = self._prove("check", version)
            failures = tuple(figures["failures"])
            store.vouch(version, {})
            known = replace(known, state=State.CHECKED, figures={**figures, "facts": board}, failures=failures, on=here)
            store.keep(version, known)
        if known.failures:
            raise AccuracyError("; ".join(known.failures), hint=_STAYS)
        assert known.figures is not None
        if exceeded := Limits(**(limits or {})).judge(known.figures["measured"]):
            store.keep(version, replace(known, failures=exceeded))  # so that it does not become active some other way
            raise LimitError("; ".join(exceeded), hint=f"{_STAYS}; the limits are the inventory's, or --limit's")
        return {"figures": known.figures, "reused": reused}

    def activate(self, *, version: str) -> dict[str, Any]:
        """Switch to a version that was proven."""
        folder = self.store.offered(version)
        if self.store.current != version and self.trust.given():
            self.trust.judge(folder, unsigned=False)  # again: meanwhile the board may have got other keys
        before = self.store.current
        self.store.activate(version)
        self.trust.record()
        return {"active": version, "before": before}

    # -- beside deployments

    def rollback(self) -> dict[str, Any]:
        """Go back to the version before, however old its release is."""
        left, active = self.store.rollback()
        return {"active": active, "before": left}

    def prune(self, *, unfinished: bool = True) -> dict[str, Any]:
        """Remove what is neither active nor could be gone back to."""
        for wheel in (self.store.root / "agent").glob("*.whl"):
            if str(wheel) not in sys.path:  # of other versions than this one, none of which runs: the lock is ours
                wheel.unlink()
        removed, freed = self.store.prune(unfinished=unfinished)
        return {"removed": list(removed), "freed_bytes": freed}

    def trust_keys(self, *, keys: str) -> dict[str, Any]:
        """Make ``keys`` those that the board trusts."""
        return {"keys": [key.key_id for key in self.trust.give(keys)]}

    def _prove(self, step: str, version: str) -> dict[str, Any]:
        """Run a step of ``mtu_compile.board.prove`` with the version's packages."""
        known = self.store.record(version)
        site = self.store.environments / (known.environment or "") / "site"
        if known.environment is None or not site.is_dir():
            raise DeployError(f"version {version[:12]} has no packages to run with", hint="deploy it again")
        command = [sys.executable, "-m", "mtu_compile.board.prove", step, str(self.store.bundle(version))]
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(site)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=site,
        )
        self._running(process)
        answer, errors_read = self._listen(process)
        self._running(None)
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        if "error" in answer:
            raise told(answer["error"])
        last = (errors_read.strip().splitlines() or ["nothing was said"])[-1]
        ended = f"was ended by signal {-process.returncode}" if process.returncode < 0 else "ended"
        raise DeployError(f"the {step} {ended} without an answer: {last[:300]}", hint="deploy it again with --debug")

    def _listen(self, process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
        """What a step's process says, and its standard error, of which the end is enough."""
        import threading

        lines: list[str] = []
        assert process.stdout is not None and process.stderr is not None
        stderr = process.stderr

        def drain() -> None:
            for line in stderr:
                lines.append(line)
                del lines[:-50]

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        answer: dict[str, Any] = {}
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if "stage" in said:
                self._tell(said["stage"])
            else:
                answer = said
        process.wait()
        reader.join(5)
        return answer, "".join(lines)


def told(body: Mapping[str, Any]) -> MtuError:
    """The error that another process told of: of the class it says, where that is one of ours."""
    kind = getattr(errors, str(body.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, MtuError)) or kind is errors.NotFiniteError:
        kind = DeployError if body.get("kind") != "NotFiniteError" else AccuracyError
    hint = body.get("hint")
    return kind(str(body.get("message")), hint=None if hint is None else str(hint))


def tell_of(error: BaseException) -> dict[str, Any]:
    """The inverse of ``told``."""
    if isinstance(error, MtuError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, OSError):
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        hint = "`mtu-compile boards prune HOST` removes old versions" if full else None
        message = f"{error.filename or 'the board'}: {error.strerror or error}"
        return {"kind": "DeployError", "message": message, "hint": hint}
    return {"kind": "DeployError", "message": f"{type(error).__name__}: {error}", "hint": None}


__all__ = ["Record", "Steps", "record", "tell_of", "told"]
