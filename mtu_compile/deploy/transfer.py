"""Files to a board over SFTP: only those it lacks, each from where an earlier transfer stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.core.errors import DeployError
from mtu_compile.deploy.connection import LinkLost, load
from mtu_compile.deploy.inventory import Place
from mtu_compile.deploy.link import Link, lost_or

if TYPE_CHECKING:
    import asyncssh

#: Bytes of one write, which is what OpenSSH's server takes; and how many are on their way at a time.
_BLOCK = 32 << 10
_WINDOW = 64


async def send(
    connection: asyncssh.SSHClientConnection,
    link: Link,
    place: Place,
    sources: Mapping[str, Path],
    missing: Mapping[str, int],
    incoming: str,
    advance: Callable[[int], None],
) -> int:
    """Send files, and have the agent take each as soon as it is whole.

    Args:
        sources: every file by its SHA-256.
        missing: those to send, by SHA-256, with the bytes that arrived earlier.
        incoming: the board's folder for them.
        advance: called with bytes as they are sent.

    Returns:
        Bytes that were sent.

    Raises:
        DeployError: the board cannot write (its disk is full), or a file came out differently, twice.
        LinkLost: the connection is gone.
    """
    asyncssh = load()
    sent = 0
    try:
        async with connection.start_sftp_client() as sftp:
            # Small ones first: of an aborted deployment most files are there then.
            for sha256 in sorted(missing, key=lambda one: sources[one].stat().st_size):
                arrived = missing[sha256]
                for attempt in (0, 1):
                    sent += await _send(sftp, sources[sha256], f"{incoming}/{sha256}", arrived, advance)
                    try:
                        await link.request("accept", sha256=sha256)
                        break
                    except LinkLost:
                        raise
                    except DeployError:
                        if attempt:
                            raise
                        arrived = 0  # it was removed there: what had arrived earlier was not what it should be
    except asyncssh.SFTPError as error:
        raise lost_or(error, place, "files are sent") from error
    except (OSError, asyncssh.Error) as error:
        raise LinkLost(
            f"the link to {place.host} was cut while files are sent", hint="deploy again: it goes on where it stopped"
        ) from error
    return sent


async def _send(
    sftp: asyncssh.SFTPClient, source: Path, target: str, arrived: int, advance: Callable[[int], None]
) -> int:
    """One file; bytes sent. Writes are asked for in order, so of what arrived all but the last window is certain."""
    asyncssh = load()
    size = source.stat().st_size
    start = 0 if arrived > size else max(0, arrived - _BLOCK * _WINDOW) if arrived < size else size
    flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | (asyncssh.FXF_TRUNC if start == 0 else 0)
    with source.open("rb") as file:
        file.seek(start)
        async with sftp.open(target, flags, encoding=None) as remote:
            waiting: set[asyncio.Task[int]] = set()
            offset = start
            try:
                while block := file.read(_BLOCK):
                    waiting.add(asyncio.ensure_future(remote.write(block, offset)))
                    offset += len(block)
                    if len(waiting) >= _WINDOW:
                        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                        _settle(done, advance)
                if waiting:
                    done, waiting = await asyncio.wait(waiting)
                    _settle(done, advance)
            finally:
                for one in waiting:
                    one.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
    return size - start


def _settle(done: set[asyncio.Task[int]], advance: Callable[[int], None]) -> None:
    """Tell of writes that have ended; raises what the first of them raised, after all were asked."""
    errors = [error for one in done if (error := one.exception()) is not None]
    if errors:
        raise errors[0]
    for one in done:
        advance(one.result())
