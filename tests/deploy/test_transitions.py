"""A deployment over SSH that is broken off: the board runs what it ran, or what is new and proven; the next completes.

Named after the step in which it happens. Moments inside of a step on the board are tried one by one in
``tests/board/test_store.py``; here it is what a network, a power supply and a disk do to both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtu_compile import bundle
from mtu_compile.board.record import State
from mtu_compile.core.errors import DeployError
from mtu_compile.deploy import deployment
from mtu_compile.deploy.connection import LinkLost
from mtu_compile.deploy.deployment import STEPS, Options, Outcome, Package, Unwatched
from tests.deploy import hosts as networks
from tests.deploy.conftest import Bench
from tests.deploy.hosts import Host

pytestmark = pytest.mark.heavy

#: Cases are half a minute each: those where most can go wrong are run by make test-all, the others by make test-slow.
FIRST = ("transfer", "check", "activate")
CASES = [step if step in FIRST else pytest.param(step, marks=pytest.mark.slow) for step in STEPS]

#: Seconds: long for an agent on a busy machine, short for a test.
SILENCE = 4.0


class At(Unwatched):
    """Does something once, when a step begins, or a stage of it that is called so."""

    def __init__(self, step: str, act: Callable[[], object], stage: str = "") -> None:
        self.step, self.act, self.stage, self.done = step, act, stage, False

    def begins(self, board: str, step: str, what: str = "") -> None:
        if step == self.step and what.startswith(self.stage) and not self.done:
            self.done = True
            self.act()


def go(bench: Bench, host: Host, path: Path, watch: Unwatched | None = None, **options: object) -> Outcome:
    chosen = Options(**{"activate": True, "unsigned": True, "silence": SILENCE, "retries": 0, **options})  # type: ignore[arg-type]
    place, package = bench.place(host), Package.read(path)
    return asyncio.run(deployment.deploy(host.name, place, package, chosen, watch))


@pytest.fixture(scope="module")
def first(bench: Bench) -> dict[str, str]:
    """By board, the version that runs there before a test: every board has one."""
    path, found = bench.bundle("first"), {}
    for host in bench.hosts:
        outcome = go(bench, host, path, silence=600, retries=2)
        assert outcome.error is None, outcome.error
        assert outcome.active is not None
        found[host.name] = outcome.active
    return found


def after_a_failure(bench: Bench, host: Host, path: Path, before: str) -> None:
    """The board runs what it should, and a second deployment completes."""
    store = bench.store(host)
    active = store.current
    assert active is not None and bundle.read(store.bundle(active))
    known = store.record(active)
    assert known.state is State.CHECKED and not known.failures and known.figures is not None
    outcome = go(bench, host, path, retries=3, silence=600)
    assert outcome.error is None and outcome.reached == "activate", outcome.error
    assert store.current == outcome.version and bundle.read(store.bundle(store.current))
    assert active in (before, outcome.version)


def number(step: str, how: str) -> int:
    return len(STEPS) * ("host", "agent", "cable", "power").index(how) + STEPS.index(step)


def board_for(bench: Bench, step: str, how: str) -> Host:
    return bench.hosts[number(step, how) % len(bench.hosts)]


@pytest.mark.parametrize("step", CASES)
def test_the_host_is_killed(bench: Bench, first: dict[str, str], step: str) -> None:
    host = board_for(bench, step, "host")
    before, path = bench.store(host).current, bench.bundle(f"host-{step}", payload=4 << 20)
    assert before is not None
    script = textwrap.dedent(f"""
        import asyncio, os, signal
        from pathlib import Path
        from mtu_compile.deploy import deployment
        from mtu_compile.deploy.inventory import Place
        class Kill(deployment.Unwatched):
            def begins(self, board, step, what=""):
                if step == {step!r}:
                    after = {0.02 if step == "transfer" else 0.0}
                    asyncio.get_running_loop().call_later(after, os.kill, os.getpid(), signal.SIGKILL)
        options = deployment.Options(activate=True, unsigned=True, silence={SILENCE}, retries=0)
        place = Place({host.address!r}, "root", root={str(host.root)!r}, python={networks.PYTHON!r})
        package = deployment.Package.read(Path({str(path)!r}))
        asyncio.run(deployment.deploy("board", place, package, options, Kill()))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    after_a_failure(bench, host, path, before)


@pytest.mark.parametrize("step", CASES)
def test_the_agent_is_killed(bench: Bench, first: dict[str, str], step: str) -> None:
    host = board_for(bench, step, "agent")
    before, path = bench.store(host).current, bench.bundle(f"agent-{step}", payload=1 << 20)
    assert before is not None
    stage = "check t2i" if step == "check" else ""
    watch = At(step, host.kill_agents, stage) if step != "probe" else At("plan", host.kill_agents)
    outcome = go(bench, host, path, watch)
    assert watch.done and isinstance(outcome.error, LinkLost), outcome.error
    after_a_failure(bench, host, path, before)


@pytest.mark.parametrize("how", ["cable", "power"])
@pytest.mark.parametrize("step", CASES)
def test_the_cable_is_pulled_or_the_power_fails(bench: Bench, first: dict[str, str], step: str, how: str) -> None:
    host = board_for(bench, step, how)
    before, path = bench.store(host).current, bench.bundle(f"{how}-{step}", payload=4 << 20)
    assert before is not None
    fail, mend = {"cable": (host.pull_cable, host.plug_cable), "power": (host.power_off, host.reboot)}[how]
    watch = At(step, fail, "check t2i" if step == "check" else "")
    try:
        outcome = go(bench, host, path, watch)
        assert watch.done and isinstance(outcome.error, LinkLost), outcome.error
    finally:
        mend()
    after_a_failure(bench, host, path, before)


# -- the disk


@pytest.fixture(scope="module")
def small_disk(bench: Bench, first: dict[str, str]) -> Iterator[Host]:
    """A board whose versions lie on a disk of their own, on which one is active."""
    host = bench.hosts[2]
    root = host.folder / "small"
    root.mkdir()
    networks.run("mount", "-t", "tmpfs", "-o", "size=420m", "none", root)
    usual = host.folder / "root"
    try:
        usual.rename(host.folder / "usual")
        usual.symlink_to(root)
        host.reboot()  # what runs in a namespace sees the mounts there were when it was started
        outcome = go(bench, host, bench.bundle("first"), silence=600, retries=2)
        assert outcome.error is None, outcome.error
        yield host
    finally:
        usual.unlink()
        (host.folder / "usual").rename(usual)
        host.power_off()
        networks.run("umount", "-l", root)
        host.start()


def fill(root: Path, *, leave: int = 0) -> Path:
    """Write until that many bytes are free."""
    path, stat = root / "filler", os.statvfs(root)
    with path.open("wb") as file, contextlib.suppress(OSError):
        file.truncate(0)
        left = stat.f_bavail * stat.f_frsize - leave
        while left > 0:
            left -= file.write(b"\0" * min(left, 1 << 20))
            file.flush()
    return path


@pytest.mark.parametrize("step", CASES[1:])
def test_the_disk_is_full(bench: Bench, small_disk: Host, step: str) -> None:
    host = small_disk
    before, path = bench.store(host).current, bench.bundle(f"full-{step}", payload=4 << 20)
    assert before is not None
    watch = At(step, lambda: fill(host.root, leave=1 << 20 if step == "transfer" else 0))
    try:
        outcome = go(bench, host, path, watch)
        assert watch.done and isinstance(outcome.error, DeployError), outcome
        assert not isinstance(outcome.error, LinkLost), outcome.error
        store = bench.store(host)
        assert store.current == before and bundle.read(store.bundle(before))
    finally:
        (host.root / "filler").unlink()
    after_a_failure(bench, host, path, before)
    asyncio.run(_prune(bench, host))


async def _prune(bench: Bench, host: Host) -> None:
    from mtu_compile.deploy import visit
    from mtu_compile.deploy.inventory import Inventory

    answers = await visit.ask(Inventory({"board": bench.place(host)}), "prune", silence=60)
    assert answers["board"].error is None


# -- what arrives


def test_a_transfer_that_was_cut_goes_on_where_it_stopped(bench: Bench, first: dict[str, str]) -> None:
    host, size = bench.hosts[0], 24 << 20
    path = bench.bundle("large", payload=size)
    arrived: list[int] = []

    class Cut(Unwatched):
        def begins(self, board: str, step: str, what: str = "") -> None:
            if step == "transfer":
                asyncio.get_running_loop().create_task(self.cut())

        async def cut(self) -> None:
            while True:
                await asyncio.sleep(0.01)
                sizes = [one.stat().st_size for one in (host.root / "incoming").iterdir()]
                if sizes and max(sizes) > 8 << 20:
                    arrived.append(max(sizes))
                    host.kill_agents()
                    for pid in host.processes():
                        with contextlib.suppress(OSError):
                            if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid != host.server:
                                os.kill(pid, signal.SIGKILL)
                    return

    outcome = go(bench, host, path, Cut())
    assert isinstance(outcome.error, LinkLost) and arrived
    outcome = go(bench, host, path, retries=2)
    assert outcome.error is None
    assert outcome.sent_bytes <= size - arrived[0] + (4 << 20), "what had arrived is not sent again"
