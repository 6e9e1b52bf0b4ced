"""A deployment without a host: a packed bundle, on a stick or fetched by the board itself, through the same steps.

``python3 -m mtu_compile.board.local install FILE`` verifies the archive, and then does what a deployment over SSH does
(``steps``): the same checks, the same store, the same switch. It may run out of our wheel, by any Python 3.10 or later:
Python's own library is all that it needs until the bundle's own packages are unpacked. The bundle has to carry them
(``mtu-compile boards wheels``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtu_compile.board import durable
from mtu_compile.board.limits import Limits
from mtu_compile.board.steps import Steps, tell_of
from mtu_compile.board.store import Store
from mtu_compile.board.wheels import fitting
from mtu_compile.bundle import MANIFEST, SIGNATURE, archive
from mtu_compile.bundle.keys import read_trusted
from mtu_compile.core.errors import EXIT_OK, EXIT_OTHER, ConfigError, DeployError, MtuError
from mtu_compile.core.schema import Mismatch, conform

#: Where a board keeps its versions, unless told; as ``deploy.inventory.ROOT``.
ROOT = Path("~/.local/share/mtu-compile")
_WHEELS = "wheels/"
#: Where an archive is unpacked in the store's folder; the next holder of the lock removes what a dead one left.
_SCRATCH = ".local"
_OWN = (MANIFEST, SIGNATURE)
_CARRY = "where it was built: mtu-compile boards wheels BUNDLE --for PYTHON-MACHINE-GLIBC (3.11-aarch64-2.36)"

Say = Callable[[str], None]


def install(
    file: Path,
    steps: Steps,
    *,
    unsigned: bool = False,
    activate: bool = False,
    again: bool = False,
    limits: Limits | None = None,
    say: Say = lambda title: None,
) -> dict[str, Any]:
    """Take a packed bundle into the board's store, whose lock is held; prove it, and if asked switch to it.

    Args:
        file: what ``mtu-compile pack`` made.
        steps: of the board's store.
        unsigned, again, limits: as the steps ``offer`` and ``check`` have them.
        activate: switch to it, once it is proven.
        say: told of every step.

    Returns:
        ``version``, ``active`` and the check's ``figures``.

    Raises:
        BundleError: the archive is damaged, not signed by whom the board trusts, or carries no packages for it.
        MtuError: what a step raises; the version that was active still is.
    """
    store = steps.store
    say("verify")
    scratch = store.root / _SCRATCH
    durable.remove(scratch)
    scratch.mkdir()
    try:
        root = scratch / "bundle"
        manifest = archive.unpack(file, root, trusted=steps.trust.given() or None).manifest
        names = fitting(name for name in manifest.files if name.startswith(_WHEELS))
        if not any(Path(name).name.startswith("mtu_compile-") for name in names):
            raise DeployError("the bundle carries no packages that fit this board's Python", hint=_CARRY)
        wheels = {Path(name).name: manifest.files[name] for name in names}
        texts = {name: (root / name).read_text(encoding="utf-8") for name in _OWN if (root / name).is_file()}
        sizes = {sha256: (root / name).stat().st_size for name, sha256 in manifest.files.items()}
        if not steps.trust.given() and not unsigned:
            steps.trust.judge(root, unsigned=False)  # refuses it, before anything of it is kept
        for name, sha256 in manifest.files.items():
            if not store.object(sha256).is_file():
                (root / name).replace(store.incoming / sha256)
    except BaseException:
        durable.remove(scratch)
        raise
    durable.remove(scratch)
    say("plan")
    offered = steps.offer(
        manifest=texts[MANIFEST], signature=texts.get(SIGNATURE), sizes=sizes, wheels=wheels, unsigned=unsigned
    )
    version = str(offered["version"])
    say("transfer")
    for sha256 in offered["missing"]:
        steps.accept(sha256=sha256)
    say("unpack")
    steps.unpack(version=version)
    say("install")
    steps.install(version=version, wheels=wheels)
    say("build")
    steps.build(version=version)
    say("check")
    most = {name: value for name, value in asdict(limits or Limits()).items() if value is not None}
    checked = steps.check(version=version, again=again, limits=most)
    if activate:
        say("activate")
        steps.activate(version=version)
    return {"version": version, "active": store.current, "figures": checked["figures"]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python3 -m mtu_compile.board.local", description="Versions of a bundle on this board, without a host."
    )
    made.add_argument("--root", type=Path, default=ROOT, help=f"Where this board keeps its versions. Default: {ROOT}.")
    actions = made.add_subparsers(dest="action", required=True)
    one = actions.add_parser("install", help="Prove a packed bundle here, and with --activate switch to it.")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--activate", action="store_true", help="Switch to it, once it is proven.")
    one.add_argument("--unsigned", action="store_true", help="It is not signed; refused where keys were given.")
    one.add_argument("--recheck", action="store_true", help="Check what was checked here before.")
    for name in asdict(Limits()):
        one.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="MOST", help="Refuse it if it takes more.")
    actions.add_parser("status", help="What is here, and which version runs.")
    actions.add_parser("rollback", help="Go back to the version before.")
    actions.add_parser("prune", help="Remove versions that are neither active nor could be gone back to.")
    actions.add_parser("trust", help="From now on, take only what one of these keys signed.").add_argument(
        "keys", type=Path, nargs="+", metavar="KEY.pub"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module. Prints what came of it as JSON; the exit codes are those of ``mtu-compile``."""
    given = parser().parse_args(arguments)

    def say(title: str) -> None:
        print(title, file=sys.stderr, flush=True)

    try:
        store = Store(given.root.expanduser().absolute())
        with store.locked():
            steps = Steps(store, lambda title: say(f"  {title}"), lambda process: None)
            steps.trust.record()
            done = _act(given, steps, say)
    except (MtuError, OSError) as error:
        told = tell_of(error)
        print(f"error: {told['message']}", file=sys.stderr)
        if told["hint"]:
            print(f"hint: {told['hint']}", file=sys.stderr)
        return error.exit_code if isinstance(error, MtuError) else EXIT_OTHER
    print(json.dumps(done, indent=2))
    return EXIT_OK


def _act(given: argparse.Namespace, steps: Steps, say: Say) -> dict[str, Any]:
    if given.action == "install":
        try:
            limits = conform(Limits, {name: getattr(given, name) for name in asdict(Limits())})
        except Mismatch as mismatch:
            raise mismatch.at("limits", error=ConfigError, hint="a number above 0") from mismatch
        choices = {"unsigned": given.unsigned, "activate": given.activate, "again": given.recheck}
        return install(given.file, steps, limits=limits, say=say, **choices)
    if given.action == "trust":
        return steps.trust_keys(keys="".join(f"{key.line}\n" for key in read_trusted(given.keys)))
    done: dict[str, Any] = getattr(steps, given.action)()
    return done


if __name__ == "__main__":
    sys.exit(main())
