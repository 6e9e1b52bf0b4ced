"""Whose bundles a board takes, and which release it has reached.

A board that was given keys takes nothing else than what one of them signed, and no older release than it ever ran; the
packages a bundle runs with have to be files of the bundle then, as the signature is over those alone. A board that was
given none takes what comes over SSH, if whoever sends it says that it is not signed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mtu_compile import bundle
from mtu_compile.board import durable
from mtu_compile.board.store import Store
from mtu_compile.bundle import Manifest, signature
from mtu_compile.bundle.keys import PublicKey, read_trusted
from mtu_compile.bundle.release import Highest, check_one_way
from mtu_compile.bundle.signature import Signed
from mtu_compile.core.errors import BundleError


class Trust:
    """What a board was told of whom to trust, in ``ROOT/trusted``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.root / "trusted"
        self._keys = self._folder / "keys"
        self._highest = self._folder / "highest.json"

    def given(self) -> tuple[PublicKey, ...]:
        """The keys the board was given."""
        return read_trusted([self._keys]) if self._keys.is_file() else ()

    def give(self, lines: str) -> tuple[PublicKey, ...]:
        """Make these the board's keys, in the place of those it has; the keys.

        Args:
            lines: as OpenSSH writes public keys, one a line.

        Raises:
            InputError: something else is among them, or there is none; the board keeps those it has.
        """
        self._folder.mkdir(exist_ok=True)
        proposed = self._folder / ".keys.proposed"
        try:
            proposed.write_text(lines, encoding="utf-8")
            keys = read_trusted([proposed])
        finally:
            proposed.unlink(missing_ok=True)
        durable.write(self._keys, "".join(f"{key.line}\n" for key in keys).encode())
        durable.sync_folder(self._store.root)
        return keys

    def highest(self) -> Highest | None:
        """The latest release that was ever active here."""
        return Highest(**json.loads(self._highest.read_bytes())) if self._highest.is_file() else None

    def judge(self, folder: Path, *, unsigned: bool) -> tuple[Manifest, Signed | None]:
        """The manifest in ``folder``, after its signature was found good; of other files nothing is read.

        Args:
            folder: has ``manifest.json``, and ``signature.json`` if the bundle is signed.
            unsigned: whoever sends it says that there is no signature to be asked for.

        Raises:
            BundleError: not signed by whom the board trusts, an older release, or no manifest.
        """
        keys = self.given()
        if not keys:
            if not unsigned:
                raise BundleError(
                    "this board was given no key, so that it cannot tell whose bundle this is",
                    hint="give it one (mtu-compile boards trust HOST --key KEY.pub), or say --unsigned",
                )
            return bundle.read(folder, verify=False), None
        signed = signature.verify(folder, keys)
        check_one_way(signed, self.highest())
        return bundle.read(folder, verify=False, trusted=keys), signed

    def check_wheels(self, manifest: Manifest, wheels: Mapping[str, str]) -> None:
        """``BundleError`` if the board has keys, and one of ``wheels`` (SHA-256 by name) is no file of the bundle."""
        if not self.given():
            return
        vouched = set(manifest.files.values())
        for name, sha256 in wheels.items():
            if sha256 not in vouched:
                raise BundleError(
                    f"the package {name} is no file of the signed bundle, and this board takes nothing else",
                    hint="put packages for it into the bundle (mtu-compile boards wheels), and sign it again",
                )

    def record(self) -> None:
        """Remember the active version's release, if it is the highest; to be said after each switch, and at each start.

        A loss of power can come between the switch and this: then the next start says it.
        """
        active = self._store.current
        known = None if active is None else self._store.record(active)
        if active is None or known is None or known.release is None or known.key is None:
            return
        highest = self.highest()
        if highest is None or known.release > highest.release:
            self._folder.mkdir(exist_ok=True)
            body = asdict(Highest(known.release, active))
            durable.write(self._highest, json.dumps(body).encode())
