"""What a board built of a bundle is run as it was built, or not at all; and what is slow or large there is not run."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mtu_compile import bundle, runtime
from mtu_compile.board.store import Store
from mtu_compile.bundle import EngineRef, Manifest, vouched
from mtu_compile.core import vendors
from mtu_compile.core.errors import BundleError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.runtime import built
from tests.board import conftest as tiny
from tests.board.local_agent import Delivery, LocalAgent, Refused
from tests.board.toy_vendor import VENDOR
from tests.conftest import MadeOnce

ENGINE = "built/unet.engine"


def for_toy(original: Path, root: Path, name: str) -> Path:
    """The bundle for a device whose engines are built on the board."""
    shutil.copytree(original, root)
    manifest: Manifest = bundle.read(root, verify=False)

    def of(ref: EngineRef) -> EngineRef:
        return replace(ref, kind="toy")

    assert manifest.vae_encoder is not None
    tasks = {one: replace(entry, engine=of(entry.engine)) for one, entry in manifest.tasks.items()}
    changed = replace(
        manifest,
        source=bundle.Source(name, "0" * 64),
        text=replace(manifest.text, engine=of(manifest.text.engine)),
        vae_encoder=of(manifest.vae_encoder),
        vae_decoder=of(manifest.vae_decoder),
        tasks=tasks,
    )
    bundle.write(root, changed)
    return root


def vendor_wheel(folder: Path) -> Path:
    """The toy vendor's package."""
    folder.mkdir(exist_ok=True)
    path = folder / "toy_vendor-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(Path(__file__).with_name("toy_vendor.py"), "toy_vendor.py")
        archive.writestr("toy.py", f"from mtu_compile.core.vendors import Vendor\nVENDOR = {VENDOR!r}\n")
        archive.writestr("toy_vendor-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-vendor\nVersion: 1\n")
        archive.writestr("toy_vendor-1.dist-info/entry_points.txt", "[mtu_compile.vendors]\ntoy = toy:VENDOR\n")
    return path


@pytest.fixture(scope="module")
def packages(made_once: MadeOnce) -> Iterator[Path]:
    """The vendor's package: its wheel, and a folder of what is in it, which this process and agents know."""

    def make(folder: Path) -> None:
        zipfile.ZipFile(vendor_wheel(folder)).extractall(folder / "unpacked")

    folder = made_once("toy-vendor", make)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "unpacked"))
        vendors.vendors.cache_clear()
        yield folder
    vendors.vendors.cache_clear()


def agent_on(root: Path, packages: Path) -> LocalAgent:
    return LocalAgent(root, environment={"PYTHONPATH": str(packages / "unpacked")})


@pytest.fixture(scope="module")
def running(made_once: MadeOnce, packages: Path) -> Path:
    """A board that built the engines of one version, which is active, and of the next one, which is proven."""
    original = tiny.onnxruntime_bundle(made_once)

    def make(folder: Path) -> None:
        with agent_on(folder / "board", packages) as agent:
            for name, until in (("first", "activate"), ("second", "check")):
                delivery_of(for_toy(original, folder / name, name), packages).deploy(agent, until=until)

    return made_once("board-that-builds", make)


def delivery_of(root: Path, packages: Path) -> Delivery:
    delivery = Delivery(root, root.parent / "own")
    wheel = packages / "toy_vendor-1-py3-none-any.whl"
    delivery.wheels[wheel.name] = file_sha256(wheel)
    delivery.sources[file_sha256(wheel)] = wheel
    return delivery


class Here:
    """A copy of the board for one test."""

    def __init__(self, running: Path, packages: Path, root: Path) -> None:
        shutil.copytree(running / "board", root, symlinks=True, copy_function=os.link)
        (root / "lock").unlink()
        self.store, self.folder, self.packages = Store(root), running, packages
        self.first = str(self.store.current)
        (self.second,) = set(self.store.ids()) - {self.first}

    def agent(self) -> LocalAgent:
        return agent_on(self.store.root, self.packages)

    def deploy_second(self, agent: LocalAgent) -> None:
        delivery_of(self.folder / "second", self.packages).deploy(agent)

    def tamper(self, version: str, name: str = ENGINE) -> Path:
        """Another engine in the place of one, and the index agrees: whoever writes there can do both."""
        root = self.store.bundle(version)
        path = root / name
        content = path.read_bytes() + b"\n"
        path.unlink()  # not in place: this test's board shares its files with others'
        path.write_bytes(content)
        index = (root / built.INDEX).read_text()
        entry = next(one for one in built.read_index(root).values() if one.engine == name)
        index = index.replace(entry.engine_sha256, file_sha256(path)).replace(
            f'"bytes": {entry.bytes}', f'"bytes": {len(content)}'
        )
        (root / built.INDEX).unlink()
        (root / built.INDEX).write_text(index)
        return path


@pytest.fixture
def here(running: Path, packages: Path, tmp_path: Path) -> Here:
    return Here(running, packages, tmp_path / "board")


def test_what_was_built_is_vouched_for_and_runs(here: Here) -> None:
    root = here.store.bundle(here.first)
    listed = vouched.read(root)
    assert listed is not None and set(listed) == set(vouched.there(root)) and len(listed) == 5
    with runtime.load(root) as loaded:
        assert loaded.run("t2i", "a red cat").image.size == (32, 32)


def test_an_engine_that_was_changed_is_not_run_whatever_the_index_beside_it_says(here: Here) -> None:
    here.tamper(here.first)
    root = here.store.bundle(here.first)
    manifest = bundle.read(root)
    ref = manifest.tasks["t2i"].engine
    assert built.damage(root, manifest, ref, built.read_index(root)[ref.path]) is None, "the index is deceived"
    with runtime.load(root) as loaded, pytest.raises(BundleError, match="none of those this board proved"):
        loaded.run("t2i", "a red cat")


def test_nothing_is_switched_to_of_which_an_engine_was_changed(here: Here) -> None:
    here.tamper(here.second)
    with here.agent() as agent:
        with pytest.raises(Refused, match=r"BundleError: .*unet\.engine is not the file that this board built"):
            agent.ask("activate", version=here.second)
        assert here.store.current == here.first
        with pytest.raises(Refused, match="is not the file"):
            agent.ask("check", version=here.second)


def test_nothing_is_gone_back_to_of_which_an_engine_is_gone(here: Here) -> None:
    with here.agent() as agent:
        agent.ask("activate", version=here.second)
        (here.store.bundle(here.first) / ENGINE).unlink()
        with pytest.raises(Refused, match=r"BundleError: .*missing"):
            agent.ask("rollback")
    assert here.store.current == here.second


def test_deploying_again_builds_what_was_changed_and_nothing_else(here: Here) -> None:
    changed = here.tamper(here.second)
    kept = here.store.bundle(here.second) / "built" / "unet_edit.engine"
    before = kept.stat().st_mtime_ns
    with here.agent() as agent:
        here.deploy_second(agent)
    assert here.store.current == here.second and kept.stat().st_mtime_ns == before
    assert changed.read_bytes() == (here.store.bundle(here.second) / "unet" / "model.onnx").read_bytes()


@pytest.mark.parametrize("damage", ["", '{"format": "mtu-vouched-1", "files": [1]}'])
def test_a_list_that_is_damaged_vouches_for_nothing(here: Here, damage: str) -> None:
    path = here.store.versions / here.second / vouched.FILE
    path.unlink()
    path.write_text(damage)
    with here.agent() as agent:
        with pytest.raises(Refused, match=r"BundleError: built\.json"):
            agent.ask("activate", version=here.second)
        here.deploy_second(agent)
    assert here.store.current == here.second


def test_what_a_runtime_kept_of_its_compilations_is_thrown_away_unless_the_board_proved_it(here: Here) -> None:
    root = here.store.bundle(here.second)
    ours, theirs = root / "built" / "1.blob", root / "built" / "2.cl_cache"
    ours.write_bytes(b"compiled while it was proven")
    here.store.vouch(here.second, {})
    theirs.write_bytes(b"from elsewhere")
    assert built.cache(root) == root / "built" and ours.exists() and not theirs.exists()
    ours.write_bytes(b"changed")
    assert built.cache(root) == root / "built" and not ours.exists()
    here.store.check_built(here.second)  # what can be compiled again is no reason not to run


def test_a_bundle_outside_of_a_store_goes_by_its_own_index(here: Here, tmp_path: Path) -> None:
    shutil.copytree(here.store.bundle(here.first), tmp_path / "alone")
    assert vouched.read(tmp_path / "alone") is None and vouched.problem(tmp_path / "alone") is None
    with runtime.load(tmp_path / "alone") as loaded:
        assert loaded.run("t2i", "a red cat").image.size == (32, 32)


# -- limits


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"step_ms": 0.001}, "a step takes .* ms here, and 0.001 are allowed"),
        ({"image_s": 1e-6}, "a picture takes .* s here, and 1e-06 are allowed"),
        ({"memory_mb": 1}, "of memory here, and 1.0 MB are allowed"),
    ],
)
def test_a_version_that_is_too_slow_or_too_large_does_not_replace_the_one_that_runs(
    here: Here, limits: dict[str, float], said: str
) -> None:
    """Although it was proven, and with what was measured then."""
    with here.agent() as agent:
        with pytest.raises(Refused, match=f"LimitError: .*{said}"):
            agent.ask("check", version=here.second, limits=limits)
        assert not agent.stages, "nothing was measured again"
        with pytest.raises(Refused, match="was not proven"):
            agent.ask("activate", version=here.second)
        assert here.store.current == here.first


def test_a_version_within_its_limits_is_proven(here: Here) -> None:
    with here.agent() as agent:
        agent.ask("check", version=here.second, limits={"step_ms": 1e6, "image_s": 1e6, "memory_mb": 1e6})
        agent.ask("activate", version=here.second)
    assert here.store.current == here.second
