"""The host's end of the conversation with a board's agent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mtu_compile.board.agent import PROTOCOL
from mtu_compile.board.steps import told
from mtu_compile.core.errors import DeployError
from mtu_compile.deploy.connection import LinkLost, load
from mtu_compile.deploy.inventory import Place

if TYPE_CHECKING:
    import asyncssh

#: Oldest Python that runs the agent.
OLDEST = (3, 10)

#: For any Python 3: what the board is, as far as it decides how to go on.
_PROBE = """
import json, os, platform, sys
print(json.dumps({"python": list(sys.version_info[:2]), "machine": platform.machine(), "home": os.path.expanduser("~"),
"glibc": platform.libc_ver()[1], "system": platform.system(), "implementation": platform.python_implementation()}))
"""

#: Runs a module out of a wheel, if that is the wheel it was told of.
_START = """
import hashlib, runpy, sys
wheel, wanted = sys.argv[1:3]
with open(wheel, "rb") as file:
    found = hashlib.sha256(file.read()).hexdigest()
if found != wanted:
    sys.exit("the agent is not the file that was sent")
sys.path.insert(0, wheel)
del sys.argv[1:3]
runpy.run_module("mtu_compile.board.agent", run_name="__main__")
"""

#: Bytes of one line of an answer; the figures of a check are the longest.
_MOST = 64 << 20


class Link:
    """A conversation with an agent, which ends it when nothing was heard of the host for a while."""

    def __init__(self, process: asyncssh.SSHClientProcess[str], host: str) -> None:
        self._process, self._host = process, host
        self.pid = 0

    async def request(self, do: str, told_of: Callable[[str], None] = lambda title: None, **arguments: Any) -> Any:
        """Have the agent do a step.

        Args:
            do: name of the step (``mtu_compile.board.steps.Steps``).
            told_of: called with the title of each stage of it.
            arguments: the step's.

        Raises:
            MtuError: what the step raised there.
            LinkLost: the connection, or the agent, is gone.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            await self._process.stdin.drain()
        except (OSError, load().Error) as error:
            raise self._lost(do) from error
        return await self.answer(do, told_of)

    async def answer(self, do: str, told_of: Callable[[str], None] = lambda title: None) -> Any:
        """What comes next; raises as ``request``."""
        while True:
            try:
                line = await self._process.stdout.readline()
            except (OSError, load().Error, asyncio.IncompleteReadError, ValueError) as error:
                raise self._lost(do) from error
            if not line.endswith("\n"):
                raise self._lost(do)
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a board that greets who logs in
            if not isinstance(said, dict):
                continue
            if "stage" in said:
                told_of(str(said["stage"]))
            elif "error" in said:
                raise told(said["error"])
            elif "ok" in said:
                return said["ok"]

    async def beat(self, every: float) -> None:
        """Say again and again that the host is there."""
        while True:
            await asyncio.sleep(every)
            with suppress(OSError, load().Error):
                self._process.stdin.write('{"do": "ping"}\n')

    def _lost(self, do: str) -> LinkLost:
        return LinkLost(
            f"the link to {self._host} was cut, or its agent ended, during {do!r}",
            hint="deploy again: it goes on where it stopped; the version that was active still is",
        )


async def probe(connection: asyncssh.SSHClientConnection, place: Place) -> dict[str, Any]:
    """Python, machine, glibc and home of a board.

    Raises:
        DeployError: it has no Python, or one that is too old.
        LinkLost: the connection is gone.
    """
    asyncssh = load()
    try:
        done = await connection.run(f"{shlex.quote(place.python)} -c {shlex.quote(_PROBE)}", check=False)
    except (OSError, asyncssh.Error) as error:
        raise LinkLost(f"the link to {place.host} was cut during 'probe'", hint="deploy again") from error
    lines = str(done.stdout or "").strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        version = tuple(found["python"])
    except (IndexError, ValueError, KeyError, TypeError) as error:
        if done.exit_status is None:
            raise LinkLost(f"the link to {place.host} was cut during 'probe'", hint="deploy again") from error
        why = (str(done.stderr or "").strip().splitlines() or [f"exit code {done.exit_status}"])[-1]
        raise DeployError(
            f"{place.host} does not run {place.python}: {why}", hint='name another one in the inventory: python = "…"'
        ) from error
    if version < OLDEST or found["implementation"] != "CPython" or found["system"] != "Linux":
        runs = f"{found['implementation']} {'.'.join(map(str, version))} on {found['system']}"
        raise DeployError(
            f"{place.host} has {runs}, and the agent needs CPython {'.'.join(map(str, OLDEST))} or later on Linux",
            hint='name another one in the inventory: python = "python3.10"',
        )
    return found


def root_of(place: Place, home: str) -> str:
    """The absolute path of a board's root folder; it may be the home's (``~/…``)."""
    return (
        str(PurePosixPath(home) / place.root.removeprefix("~/"))
        if place.root.startswith("~/")
        else str(PurePosixPath(home) / place.root)
    )


@asynccontextmanager
async def agent(
    connection: asyncssh.SSHClientConnection, place: Place, root: str, wheel: Path, *, silence: float
) -> AsyncIterator[Link]:
    """An agent on the board, started from our own wheel, which is sent if it is not there.

    Args:
        root: of the board's versions; absolute.
        wheel: ours.
        silence: seconds without a word after which the agent ends.

    Raises:
        DeployError: the board has no SFTP, its disk is full, the agent does not start, or speaks otherwise.
        LinkLost: the connection is gone.
    """
    asyncssh = load()
    content = wheel.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    there = f"{root}/agent/{sha256}.whl"
    try:
        async with connection.start_sftp_client() as sftp:
            if not await sftp.isfile(there) or (await sftp.stat(there)).size != len(content):
                await sftp.makedirs(f"{root}/agent", exist_ok=True)
                arriving = f"{root}/agent/.{sha256}.{secrets.token_hex(4)}"
                async with sftp.open(arriving, "wb") as file:
                    await file.write(content)
                await sftp.posix_rename(arriving, there)
    except asyncssh.SFTPError as error:
        raise lost_or(error, place, "sending the agent") from error
    except asyncssh.ChannelOpenError as error:
        raise DeployError(
            f"{place.host} has no SFTP: {error.reason}", hint="its sshd_config needs Subsystem sftp"
        ) from error
    except (OSError, asyncssh.Error) as error:
        raise LinkLost(f"the link to {place.host} was cut while sending the agent", hint="deploy again") from error
    words = [place.python, "-c", _START, there, sha256, "--root", root, "--silence", f"{silence:g}"]
    try:
        process = await connection.create_process(" ".join(map(shlex.quote, words)), encoding="utf-8")
    except (OSError, asyncssh.Error) as error:
        raise LinkLost(f"the link to {place.host} was cut while starting the agent", hint="deploy again") from error
    link = Link(process, place.host)
    beating = asyncio.create_task(link.beat(silence / 4))
    try:
        try:
            hello = await link.answer("start")
        except LinkLost as error:
            raise await _not_started(process, place, error) from error
        if hello.get("protocol") != PROTOCOL:
            raise DeployError(f"the agent on {place.host} speaks protocol {hello.get('protocol')}, not {PROTOCOL}")
        link.pid = int(hello["pid"])
        yield link
    finally:
        beating.cancel()
        with suppress(OSError, asyncssh.Error):
            process.stdin.write_eof()
        process.close()


async def _not_started(process: Any, place: Place, error: LinkLost) -> DeployError:
    """Why an agent said nothing: what Python printed, if the connection still stands."""
    with suppress(Exception):
        said = str(await asyncio.wait_for(process.stderr.read(), 2)).strip().splitlines()
        if said:
            return DeployError(f"the agent does not start on {place.host}: {said[-1]}")
    return error


def lost_or(error: Any, place: Place, doing: str) -> DeployError:
    """What an SFTP error means: the connection is gone, or the board cannot write."""
    asyncssh = load()
    if isinstance(error, (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)):
        return LinkLost(
            f"the link to {place.host} was cut while {doing}", hint="deploy again: it goes on where it stopped"
        )
    full = "; is its disk full?" if isinstance(error, asyncssh.SFTPFailure) else ""
    return DeployError(
        f"{place.host} cannot write while {doing}: {error.reason}{full}",
        hint="`mtu-compile boards prune HOST` removes old versions; what has arrived stays",
    )
