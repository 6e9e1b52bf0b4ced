"""The one-way rule: what a board runs is never replaced by an older release, unless somebody says ``rollback``."""

from __future__ import annotations

from dataclasses import dataclass

from mtu_compile.bundle.signature import Signed
from mtu_compile.core.errors import BundleError


@dataclass(frozen=True)
class Highest:
    """The latest release that a board ever activated; a rollback does not lower it.

    Attributes:
        release: its number.
        manifest_sha256: of its manifest, or ``None`` if that is not known.
    """

    release: int
    manifest_sha256: str | None = None


def check_one_way(signed: Signed, highest: Highest | None, *, rollback: bool = False) -> Highest:
    """Whether a board may activate a bundle, whose signature was verified.

    Args:
        signed: what the signature says.
        highest: what the board has activated; ``None`` if nothing ever.
        rollback: somebody asks for an older release by that word.

    Returns:
        What is the board's highest once the bundle is active.

    Raises:
        BundleError: the bundle is older; or it has the number of the highest and other content, with ``rollback``,
            too: two contents of one number are a mistake or an attack, and never an older release.
    """
    if highest is None or signed.release > highest.release:
        return Highest(signed.release, signed.manifest_sha256)
    if signed.release < highest.release:
        if rollback:
            return highest
        raise BundleError(
            f"release {signed.release} is older than {highest.release}, which was active here",
            hint="ask for the rollback by its name, or sign what is really newer with a larger number",
        )
    if highest.manifest_sha256 not in (None, signed.manifest_sha256):
        raise BundleError(
            f"release {signed.release} was active here with other content",
            hint="a number belongs to one bundle; sign this one with a larger number",
        )
    return Highest(signed.release, signed.manifest_sha256)
