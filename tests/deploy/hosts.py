"""Boards that a test makes: network namespaces of their own on this machine, each with a real OpenSSH server.

A board shares this machine's files, so that a test can look at them; its root folder is its own, and its network is:
its cable can be pulled, and everything that runs on it ends when its power goes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
IP = shutil.which("ip") or "/usr/sbin/ip"
#: What runs the agent: the system's own Python, which has nothing of this project's.
PYTHON = "/usr/bin/python3"


def missing() -> str | None:
    """Why there can be no such boards here; ``None`` if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in (SSHD, IP, PYTHON):
        if not Path(program).exists():
            return f"{program} is not installed (apt-get install openssh-server iproute2 python3)"
    name = f"mtu-try-{secrets.token_hex(3)}"
    if subprocess.run([IP, "netns", "add", name], capture_output=True, check=False).returncode != 0:
        return "this kernel or container gives no network namespaces"
    subprocess.run([IP, "netns", "delete", name], check=False)
    return None


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@dataclass
class Host:
    """One board.

    Attributes:
        name: of the namespace.
        address: where SSH answers.
        folder: its files: keys, configuration, and ``root``, the agent's.
        cable: the host's end of its cable.
    """

    name: str
    address: str
    folder: Path
    cable: str
    environment: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    _server: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def start(self) -> None:
        """Switch it on."""
        config = self.folder / "sshd_config"
        setenv = "".join(f'SetEnv {key}="{value}"\n' for key, value in self.environment.items())
        listen = "".join(f"ListenAddress {one}\n" for one in (self.address, *self.more))
        config.write_text(
            f"{listen}HostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"Subsystem sftp internal-sftp\nMaxSessions 50\nMaxStartups 100\nUseDNS no\n{setenv}"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        log = (self.folder / "sshd.log").open("ab")
        command = [IP, "netns", "exec", self.name, SSHD, "-D", "-e", "-f", str(config)]
        self._server = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection((self.address, 22), timeout=1) as link:
                if link.recv(4).startswith(b"SSH"):
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    @property
    def server(self) -> int:
        """The process that listens."""
        assert self._server is not None
        return self._server.pid

    def processes(self) -> list[int]:
        """All that runs in it."""
        listed = subprocess.run([IP, "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        return [int(one) for one in listed.split()]

    def power_off(self) -> None:
        """Nothing ends in order: every process is killed at once."""
        for _ in range(100):
            pids = self.processes()
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self._server is not None:
            self._server.wait()
            self._server = None

    def reboot(self) -> None:
        self.power_off()
        self.start()

    def set_environment(self, **environment: str) -> None:
        """What every login finds in its environment, from the next login on."""
        self.environment = environment
        self.reboot()

    def listen_on(self, address: str) -> None:
        """Answer at another address, too."""
        self.more = (address,)
        self.reboot()

    def pull_cable(self) -> None:
        run(IP, "link", "set", self.cable, "down")

    def plug_cable(self) -> None:
        run(IP, "link", "set", self.cable, "up")

    def agents(self) -> list[int]:
        """The agents, and what they run."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if any("mtu_compile.board" in word for word in words) and Path(words[0]).name.startswith("python"):
                    found.append(pid)
        return found

    def kill_agents(self) -> None:
        for pid in self.agents():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def hosts(count: int, folder: Path, key: Path) -> Iterator[list[Host]]:
    """Boards that let in who has ``key``; switched on."""
    made: list[Host] = []
    tag, net = secrets.token_hex(2), secrets.randbelow(200)
    try:
        for number in range(count):
            name = f"mtu-{tag}-{number}"
            home = folder / f"board{number}"
            home.mkdir(parents=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "host_key")
            shutil.copyfile(f"{key}.pub", home / "authorized_keys")
            here, there = f"mtu{tag}{number}h", f"mtu{tag}{number}b"
            gateway, address = (
                f"10.{213 + net % 40}.{net}.{4 * number + 1}",
                f"10.{213 + net % 40}.{net}.{4 * number + 2}",
            )
            run(IP, "netns", "add", name)
            host = Host(name, address, home, here)
            made.append(host)
            run(IP, "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
            run(IP, "address", "add", f"{gateway}/30", "dev", here)
            run(IP, "link", "set", here, "up")
            run(IP, "-n", name, "address", "add", f"{address}/30", "dev", there)
            run(IP, "-n", name, "link", "set", there, "up")
            run(IP, "-n", name, "link", "set", "lo", "up")
            host.start()
        yield made
    finally:
        for host in made:
            with contextlib.suppress(Exception):
                host.power_off()
            subprocess.run([IP, "netns", "delete", host.name], capture_output=True, check=False)
            subprocess.run([IP, "link", "delete", host.cable], capture_output=True, check=False)


def write_home(home: Path, key: Path, made: list[Host]) -> None:
    """The home of who deploys: a key, and the boards' host keys in ``known_hosts``."""
    ssh = home / ".ssh"
    ssh.mkdir(parents=True)
    ssh.chmod(0o700)
    lines = [f"{one.address} {(one.folder / 'host_key.pub').read_text().strip()}\n" for one in made]
    (ssh / "known_hosts").write_text("".join(lines))
    names = "".join(f"Host board{i}\n  HostName {one.address}\n" for i, one in enumerate(made))
    (ssh / "config").write_text(f"{names}Host *\n  IdentityFile {key}\n  User root\n")


needs_hosts = pytest.mark.skipif(missing() is not None, reason=missing() or "")
