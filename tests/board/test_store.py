"""Versions side by side on a board: what is kept, what is switched to, and what a death at any moment leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.board.record import State
from mtu_compile.board.store import Store
from mtu_compile.bundle import keys, signature
from mtu_compile.core.errors import BundleError
from mtu_compile.runtime import cpu_isa, proven
from tests.board import conftest as tiny
from tests.board.local_agent import REPOSITORY, Delivery, Died, LocalAgent, Refused
from tests.conftest import MadeOnce
from tests.waiting import alive, until


@pytest.fixture(scope="module")
def original(made_once: MadeOnce) -> Path:
    return tiny.onnxruntime_bundle(made_once)


def version_of(original: Path, root: Path, own: Path) -> Delivery:
    """The bundle with a file of its own: another version, of which a board that has the first knows most."""
    shutil.copytree(original, root)
    (root / "note.txt").write_text(root.name)
    bundle.write(root, replace(bundle.read(root, verify=False), source=bundle.Source(root.name, "0" * 64)))
    return Delivery(root, own)


@pytest.fixture
def make_delivery(original: Path, tmp_path: Path) -> Callable[[str], Delivery]:
    """Factory: a version of that name."""
    return lambda name: version_of(original, tmp_path / name, tmp_path / "own")


@pytest.fixture(scope="module")
def running(original: Path, made_once: MadeOnce) -> Path:
    """A board on which a version is active, and that version."""

    def make(folder: Path) -> None:
        with LocalAgent(folder / "board") as agent:
            version_of(original, folder / "first", folder / "own").deploy(agent)

    return made_once("running-board", make)


@pytest.fixture
def two(
    running: Path, make_delivery: Callable[[str], Delivery], tmp_path: Path
) -> tuple[Store, Delivery, Delivery, str]:
    """A board of this test's own on which the first of two versions is active."""
    store = copied(running / "board", tmp_path / "board")
    version = store.current
    assert version is not None
    return store, Delivery(running / "first", tmp_path / "own"), make_delivery("second"), version


def test_a_version_that_was_proven_runs_and_the_next_one_replaces_it(two: Any) -> None:
    store, _, second, version = two
    assert store.current == version and store.record(version).figures is not None
    with LocalAgent(store.root) as agent:
        offered = second.offer(agent)
        assert len(offered["missing"]) == 1, "only the file that differs travels, and no package"
        newer = second.deploy(agent)
        assert store.current == newer and store.previous == version
        assert agent.ask("rollback") == {"active": version, "before": newer}
    assert store.current == version
    figures = store.record(newer).figures
    assert figures is not None and figures["measured"]["tasks"]["t2i"]["device"].startswith("CPUExecutionProvider")
    assert figures["measured"]["tasks"]["edit"]["step_ms"] > 0 and figures["measured"]["peak_bytes"] > 1e6
    done = subprocess.run([store.root / "current" / "mtu-compile", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mtu-compile"), done.stderr


def test_what_two_versions_have_in_common_is_there_once(two: Any) -> None:
    store, _, second, version = two
    with LocalAgent(store.root) as agent:
        newer = second.deploy(agent)
    for name in ("unet/model.onnx", "tokenizer/tokenizer.json"):
        assert (store.bundle(version) / name).samefile(store.bundle(newer) / name)


def test_a_version_below_its_thresholds_never_becomes_active(two: Any, tmp_path: Path) -> None:
    from tests.board.test_board_check import spoil

    store, _, second, version = two
    spoil(second.bundle, "unet_edit/model.onnx", "w_out", 0.8)
    bad = Delivery(second.bundle, tmp_path / "own")
    with LocalAgent(store.root) as agent:
        with pytest.raises(Refused, match=r"AccuracyError: edit: "):
            bad.deploy(agent)
        (newer,) = set(store.ids()) - {version}
        with pytest.raises(Refused, match="was not proven"):
            agent.ask("activate", version=newer)
    assert store.current == version


def test_a_check_is_not_repeated_unless_asked_for(two: Any) -> None:
    store, first, _, version = two
    with LocalAgent(store.root) as agent:
        first.deploy(agent)
        assert not any("check" in stage for stage in agent.stages)
        agent.ask("check", version=version, again=True)
        assert any("check" in stage for stage in agent.stages)


def test_a_transfer_goes_on_where_it_stopped_and_what_arrived_wrong_is_thrown_away(two: Any) -> None:
    store, _, second, _ = two
    with LocalAgent(store.root) as agent:
        offered = second.offer(agent)
        (sha256,) = offered["missing"]
        arrived = store.incoming / sha256
        arrived.write_bytes(second.sources[sha256].read_bytes()[:3])
        assert second.offer(agent)["missing"] == {sha256: 3}
        arrived.write_bytes(b"something else")
        with pytest.raises(Refused, match="has the hash"):
            agent.ask("accept", sha256=sha256)
        assert second.offer(agent)["missing"] == {sha256: 0}
        with pytest.raises(Refused, match=r"note\.txt has not arrived"):
            agent.ask("unpack", version=offered["version"])
        second.deploy(agent, until="unpack")


def test_a_file_that_the_disk_changed_travels_again_and_the_version_is_mended(two: Any) -> None:
    store, first, _, version = two
    damaged = store.bundle(version) / "unet" / "model.onnx"
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.unlink()  # not in place: this test's board shares its files with others'
    damaged.write_bytes(content)
    store.object(bundle.read(store.bundle(version), verify=False).files["unet/model.onnx"]).unlink()
    with pytest.raises(BundleError, match="not the file"):
        bundle.read(store.bundle(version))
    (store.bundle(version) / "stray").write_text("x")
    with LocalAgent(store.root) as agent:
        first.deploy(agent)
    assert bundle.read(store.bundle(version)) and store.current == version


def test_pruning_leaves_the_active_version_and_the_one_before(
    two: Any, make_delivery: Callable[[str], Delivery]
) -> None:
    store, _, second, version = two
    with LocalAgent(store.root) as agent:
        newer = second.deploy(agent)
        third = make_delivery("third").deploy(agent)
        assert store.ids() == (version, newer, third)
        unfinished = make_delivery("fourth").deploy(agent, until="unpack")
        removed = agent.ask("prune")["removed"]
    assert set(removed) == {version, unfinished} and store.current == third and store.previous == newer
    for one in (newer, third):
        assert bundle.read(store.bundle(one))
    with LocalAgent(store.root) as agent:
        agent.ask("rollback")
        assert agent.ask("prune")["removed"] == [], "the one that ran a moment ago stays, too"


def test_two_deployments_do_not_interleave_and_a_dead_one_locks_nobody_out(two: Any) -> None:
    store, _, second, _ = two
    with LocalAgent(store.root) as one, LocalAgent(store.root) as other:
        second.offer(one)
        with pytest.raises(Refused, match="another deployment"):
            second.offer(other)
        assert other.ask("status")["active"] == store.current, "looking is free"
        one.process.kill()
        second.offer(other, wait=10)


def test_an_agent_that_hears_nothing_ends_and_unlocks_the_board(two: Any) -> None:
    store, _, second, _ = two
    with LocalAgent(store.root, silence=1) as agent:
        second.offer(agent)
        assert agent.process.wait(20) == 75
    with LocalAgent(store.root) as agent:
        second.offer(agent)


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"do": "os.system"}', '{"do": "_prove"}', '{"do": "offer"}'])
def test_what_is_no_request_does_nothing(tmp_path: Path, line: str) -> None:
    with LocalAgent(tmp_path / "board") as agent:
        assert agent.process.stdin is not None
        agent.process.stdin.write(line + "\n")
        agent.process.stdin.flush()
        with pytest.raises((Died, Refused)):
            agent._answer()


# -- OpenVINO


def test_a_bundle_for_the_boards_cpu_is_proven_there_at_every_instruction_set(
    made_once: MadeOnce, tmp_path: Path
) -> None:
    delivery = Delivery(tiny.openvino_bundle(made_once), tmp_path / "own")
    store = Store(tmp_path / "board")
    with LocalAgent(store.root) as agent:
        version = delivery.deploy(agent)
    figures = store.record(version).figures
    assert store.current == version and figures is not None
    assert all(task["device"].startswith("CPU: ") for task in figures["measured"]["tasks"].values())
    assert figures["versions"]["openvino"] and cpu_isa.level() in proven.levels(
        store.bundle(version), bundle.read(store.bundle(version))
    )


# -- trust


def signed(delivery: Delivery, private: Any, release: int, own: Path) -> Delivery:
    """With its wheel in the bundle, and a signature over all."""
    folder = delivery.bundle / "wheels"
    folder.mkdir(exist_ok=True)
    for name, sha256 in delivery.wheels.items():
        shutil.copyfile(delivery.sources[sha256], folder / name)
    bundle.write(delivery.bundle, bundle.read(delivery.bundle, verify=False))
    signature.sign(delivery.bundle, private, release=release)
    return Delivery(delivery.bundle, own)


def test_a_board_with_keys_takes_only_what_they_signed_and_nothing_older(
    make_delivery: Callable[[str], Delivery], tmp_path: Path
) -> None:
    private, other, own = keys.new_private(), keys.new_private(), tmp_path / "own"
    store = Store(tmp_path / "board")
    five, six = (signed(make_delivery(f"r{n}"), private, n, own) for n in (5, 6))
    stolen, unsigned = signed(make_delivery("stolen"), other, 9, own), make_delivery("unsigned")
    with LocalAgent(store.root) as agent:
        with pytest.raises(Refused, match="was given no key"):
            five.deploy(agent, unsigned=False)
        agent.ask("trust_keys", keys=keys.PublicKey.of(private, "us").line)
        for wrong in (stolen, unsigned):
            with pytest.raises(Refused, match="BundleError"):
                wrong.deploy(agent, unsigned=True)
        assert store.ids() == () and not list(store.objects.iterdir()), "nothing of it is on the board"
        old = five.deploy(agent, unsigned=False)
        new = six.deploy(agent, unsigned=False)
        with pytest.raises(Refused, match="older than 6"):
            five.deploy(agent, unsigned=False)
        agent.ask("rollback")
        assert store.current == old
        with pytest.raises(Refused, match="older than 6"):
            five.deploy(agent, unsigned=False)
        assert six.deploy(agent, unsigned=False) == new and store.current == new


def test_packages_that_no_signature_covers_are_refused_by_a_board_with_keys(
    make_delivery: Callable[[str], Delivery], tmp_path: Path
) -> None:
    private = keys.new_private()
    delivery = make_delivery("bare")
    signature.sign(delivery.bundle, private, release=1)
    with LocalAgent(tmp_path / "board") as agent:
        agent.ask("trust_keys", keys=keys.PublicKey.of(private).line)
        with pytest.raises(Refused, match="no file of the signed bundle"):
            delivery.offer(agent, unsigned=False)


# -- death at every moment


def faulty(root: Path, number: int, log: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY / "tests" / "deploy" / "faults"), "MTU_FAULT": f"{number}:{root}:{log}"}


def copied(source: Path, target: Path) -> Store:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)  # nothing is ever changed in place
    (target / "lock").unlink(missing_ok=True)
    return Store(target)


def moments(act: Callable[[LocalAgent], object], before: Path, tmp_path: Path) -> Iterator[tuple[str, Store]]:
    """The board after an agent was killed before its first change of a file, its second, and so on to the last."""
    board, number = tmp_path / "dying", 0
    while True:
        store, log = copied(before, board), tmp_path / "log"
        log.unlink(missing_ok=True)
        try:
            with LocalAgent(board, environment=faulty(board, number, log)) as agent:
                act(agent)
            return
        except Died:
            done = log.read_text().splitlines() if log.exists() else ["nothing"]
            assert len(done) in (number, 1)
            yield f"{number}, after {done[-1]}", store
        number += 1


def is_whole(store: Store, allowed: set[str | None], moment: str) -> None:
    """What runs is a version that was proven, every byte of it."""
    active = store.current
    assert active in allowed, moment
    if active is not None:
        assert bundle.read(store.bundle(active)), moment
        known = store.record(active)
        assert known.state is State.CHECKED and not known.failures, moment


@pytest.mark.heavy
def test_death_at_any_moment_until_a_version_is_installed(two: Any, tmp_path: Path) -> None:
    store, _, second, version = two
    deaths = 0
    for moment, after in moments(lambda agent: second.deploy(agent, until="build"), store.root, tmp_path):
        is_whole(after, {version}, moment)
        with LocalAgent(after.root) as agent:
            newer = second.deploy(agent, until="build")
        assert bundle.read(after.bundle(newer)) and after.record(newer).state is State.BUILT, moment
        leftovers = [path for path in after.root.rglob(".*") if "site" not in path.parts]
        assert not leftovers, (moment, leftovers)
        deaths += 1
    assert deaths > 30


@pytest.mark.heavy
def test_death_at_any_moment_of_mending_the_version_that_runs(two: Any, tmp_path: Path) -> None:
    store, first, _, version = two
    for name in ("unet/model.onnx", "tokenizer/tokenizer.json"):
        path = store.bundle(version) / name
        path.unlink()
        path.write_text("damaged")
    for moment, after in moments(lambda agent: first.deploy(agent, until="unpack"), store.root, tmp_path):
        assert {path.name for path in after.bundle(version).rglob(".*")} == set(), moment
        with LocalAgent(after.root) as agent:
            first.deploy(agent, until="unpack")
        is_whole(after, {version}, moment)


@pytest.mark.heavy
def test_death_at_any_moment_of_installing_packages(make_delivery: Callable[[str], Delivery], tmp_path: Path) -> None:
    """Of a wheel with few files, as there is a moment for each."""
    import zipfile

    from mtu_compile.board import environment
    from mtu_compile.core.hashing import file_sha256

    delivery, wheel = make_delivery("first"), tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("small/__init__.py", "small/part.py", "small-1.dist-info/METADATA", "small-1.data/purelib/own.py"):
            archive.writestr(name, f"# {name}")
    delivery.wheels = {wheel.name: file_sha256(wheel)}
    delivery.sources[file_sha256(wheel)] = wheel
    before = Store(tmp_path / "unpacked")
    with LocalAgent(before.root) as agent:
        version = delivery.deploy(agent, until="unpack")
    deaths = 0
    arguments = {"version": version, "wheels": delivery.wheels}
    for moment, after in moments(lambda agent: agent.ask("install", **arguments), before.root, tmp_path):
        with LocalAgent(after.root) as agent:
            agent.ask("install", **arguments)
        site = after.environments / environment.identity(delivery.wheels) / "site"
        files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
        assert files == {"small/__init__.py", "small/part.py", "small-1.dist-info/METADATA", "own.py"}, moment
        deaths += 1
    assert deaths > 15


@pytest.mark.heavy
@pytest.mark.parametrize("what", ["activate", "rollback", "prune"])
def test_death_at_any_moment_of_a_switch(two: Any, tmp_path: Path, what: str) -> None:
    store, _, second, version = two
    with LocalAgent(store.root) as agent:
        newer = second.deploy(agent, until="check" if what == "activate" else "activate")
    arguments = {"version": newer} if what == "activate" else {}
    deaths = 0
    for moment, after in moments(lambda agent: agent.ask(what, **arguments), store.root, tmp_path):
        is_whole(after, {newer} if what == "prune" else {version, newer}, moment)
        with LocalAgent(after.root) as agent:
            if what == "rollback" and after.current == version:
                continue  # it was done
            agent.ask(what, **arguments)
        is_whole(after, {version} if what == "rollback" else {newer}, moment)
        deaths += 1
    assert deaths >= (0 if what == "prune" else 3)


@pytest.mark.heavy
def test_the_highest_release_is_known_also_if_power_fails_right_after_the_switch(
    make_delivery: Callable[[str], Delivery], tmp_path: Path
) -> None:
    private, own = keys.new_private(), tmp_path / "own"
    store = Store(tmp_path / "board")
    delivery = signed(make_delivery("r3"), private, 3, own)
    older = signed(make_delivery("r2"), private, 2, own)
    with LocalAgent(store.root) as agent:
        agent.ask("trust_keys", keys=keys.PublicKey.of(private).line)
        newer = delivery.deploy(agent, unsigned=False, until="check")
    for moment, after in moments(lambda agent: agent.ask("activate", version=newer), store.root, tmp_path):
        if after.current == newer:
            with LocalAgent(after.root) as agent, pytest.raises(Refused, match="older than 3"):
                older.offer(agent, unsigned=False)
        assert after.current in (None, newer), moment


def test_a_board_that_was_left_alone_in_a_check_ends_it(two: Any) -> None:
    """The process of a step dies with its agent."""
    store, _, second, version = two
    with LocalAgent(store.root) as agent:
        newer = second.deploy(agent, until="build")
        assert agent.process.stdin is not None and agent.process.stdout is not None
        agent.process.stdin.write(f'{{"do": "check", "version": "{newer}"}}\n')
        agent.process.stdin.flush()
        assert "stage" in agent.process.stdout.readline()
        (child,) = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
        agent.process.kill()
        agent.process.wait()
        until(lambda: not alive(child))
    is_whole(store, {version}, "in a check")


@pytest.mark.parametrize("module", ["agent", "local"])
def test_nothing_but_python_itself_is_needed_before_packages_are_there(module: str) -> None:
    code = f"import sys; import mtu_compile.board.{module}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert not {"numpy", "PIL", "click", "safetensors", "cryptography", "asyncssh"} & set(eval(done.stdout))
