"""Three boards with a bundle that runs on them, for all tests of a module."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mtu_compile import bundle
from mtu_compile.board.store import Store
from mtu_compile.deploy.inventory import Place
from tests.board import conftest as tiny
from tests.conftest import MadeOnce
from tests.deploy import hosts as networks
from tests.deploy.hosts import Host


@dataclass
class Bench:
    """What a test deploys with.

    Attributes:
        hosts: the boards, switched on.
        home: of who deploys.
        original: a tiny bundle with references, for ONNX Runtime.
        folder: for bundles.
        kept: the wheels fetched for boards.
    """

    hosts: list[Host]
    home: Path
    original: Path
    folder: Path
    kept: Path
    made: dict[str, Path] = field(default_factory=dict)

    def bundle(self, name: str, *, payload: int = 0) -> Path:
        """The bundle with a file of its own of so many bytes: another version, of which boards know the rest."""
        if name not in self.made:
            root = self.folder / name
            shutil.copytree(self.original, root)
            (root / "note.bin").write_bytes(name.encode() + os.urandom(payload))
            bundle.write(root, replace(bundle.read(root, verify=False), source=bundle.Source(name, "0" * 64)))
            self.made[name] = root
        return self.made[name]

    def place(self, host: Host) -> Place:
        return Place(host.address, "root", root=str(host.root), python=networks.PYTHON)

    @staticmethod
    def store(host: Host) -> Store:
        return Store(host.root)


@pytest.fixture(scope="session")
def tiny_bundle(made_once: MadeOnce) -> Path:
    return tiny.onnxruntime_bundle(made_once)


@pytest.fixture(scope="module")
def bench(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if (reason := networks.missing()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("boards")
    key, home = folder / "id", folder / "home"
    networks.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    with networks.hosts(3, folder / "hosts", key) as made, pytest.MonkeyPatch.context() as patch:
        networks.write_home(home, key, made)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        yield Bench(made, home, tiny_bundle, folder, cache / "mtu-compile" / "boards")


@pytest.fixture
def command(bench: Bench) -> Callable[..., str]:
    """``mtu-compile`` as people type it: ``command("boards status", exit=0)`` gives what it printed."""
    import shlex
    import subprocess
    import sys

    def run(line: str, exit: int = 0) -> str:
        words = [sys.executable, "-m", "mtu_compile", *shlex.split(line)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=bench.folder, check=False)
        assert done.returncode == exit, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run
