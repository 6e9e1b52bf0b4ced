"""SSH to a board, by ``asyncssh``: the user's ssh_config, ProxyJump, agent and known_hosts.

A host key that is in no known_hosts is refused, whatever ssh_config says: what answers could be anybody's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from mtu_compile.core.errors import DeployError, ToolchainMissing, first_line
from mtu_compile.deploy.inventory import Place

if TYPE_CHECKING:
    import asyncssh


class LinkLost(DeployError):
    """The connection ended in the middle; what has arrived on the board stays, and the next one goes on there."""


@asynccontextmanager
async def connect(place: Place, *, silence: float) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """A connection that ends by itself when the board has not answered for ``silence`` seconds.

    Raises:
        DeployError: no way to the board, a host key that is not known, or nobody the board lets in.
        ToolchainMissing: ``asyncssh`` is not installed.
    """
    asyncssh = load()
    options: dict[str, Any] = {"keepalive_interval": silence / 4, "keepalive_count_max": 3, "connect_timeout": silence}
    if place.user is not None:
        options["username"] = place.user
    if place.port is not None:
        options["port"] = place.port
    try:
        connection = await asyncssh.connect(place.host, **options)
    except asyncssh.HostKeyNotVerifiable as error:
        port = "" if place.port in (None, 22) else f" -p {place.port}"
        raise DeployError(
            f"the host key of {place.host} is not known: {error.reason}",
            hint=f"log in once with `ssh{port} {place.host}` and compare the fingerprint with the board's own, which "
            "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints there",
        ) from error
    except asyncssh.PermissionDenied as error:
        raise DeployError(
            f"{place.host} lets nobody in: {error.reason}",
            hint="is your key in the board's authorized_keys, and in your ssh-agent or ssh_config?",
        ) from error
    except (OSError, TimeoutError, asyncssh.Error) as error:
        raise LinkLost(
            f"cannot reach {place.host}: {first_line(error)}", hint="is it on, and does ssh reach it?"
        ) from error
    async with connection:
        yield connection


def load() -> Any:
    """``asyncssh``; ``ToolchainMissing`` without it."""
    try:
        import asyncssh
    except ImportError as error:
        raise ToolchainMissing(
            "boards are reached by the package asyncssh, which is not installed",
            hint="pip install 'mtu-compile[deploy]'",
        ) from error
    return asyncssh
