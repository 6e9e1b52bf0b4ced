"""A packed bundle on a board that no host reaches: the same states, the same switch, by the board's own Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.board.store import Store
from mtu_compile.board.wheels import fitting
from mtu_compile.bundle import archive, keys, signature
from mtu_compile.core.errors import ConfigError
from mtu_compile.deploy.packages import System
from tests.board import conftest as tiny
from tests.board.local_agent import Delivery
from tests.board.test_store import version_of
from tests.conftest import MadeOnce


def packed(original: Path, folder: Path, name: str, release: int, private: Any = None) -> Path:
    """A version with our own wheel in it (all others this Python has), signed if there is a key, as one file."""
    delivery: Delivery = version_of(original, folder / name, folder / "own")
    (delivery.bundle / "wheels").mkdir()
    for wheel, sha256 in delivery.wheels.items():
        shutil.copyfile(delivery.sources[sha256], delivery.bundle / "wheels" / wheel)
    bundle.write(delivery.bundle, bundle.read(delivery.bundle, verify=False))
    if private is not None:
        signature.sign(delivery.bundle, private, release=release)
    return archive.pack(delivery.bundle, folder / f"{name}.mtu")


def local(store: Store, *words: object, wheel: Path) -> tuple[int, str, str]:
    """Run out of our wheel, as on a board on which nothing is installed."""
    line = [sys.executable, "-m", "mtu_compile.board.local", "--root", str(store.root), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd="/", check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def original(made_once: MadeOnce) -> Path:
    return tiny.onnxruntime_bundle(made_once)


def test_a_signed_file_is_proven_and_switched_to_and_another_is_refused(original: Path, tmp_path: Path) -> None:
    private, store = keys.new_private(), Store(tmp_path / "board")
    first = packed(original, tmp_path, "first", 1, private)
    unsigned = packed(original, tmp_path, "unsigned", 1)
    wheel = next((tmp_path / "own").glob("*.whl"))
    public = tmp_path / "key.pub"
    public.write_text(keys.PublicKey.of(private, "us").line + "\n")
    code, _, err = local(store, "install", first, wheel=wheel)
    assert code == 5 and "was given no key" in err and store.ids() == () and not list(store.incoming.iterdir())
    assert local(store, "trust", public, wheel=wheel)[0] == 0
    code, _, err = local(store, "install", unsigned, "--unsigned", "--activate", wheel=wheel)
    assert code == 5 and "not signed" in err and store.ids() == () and not list(store.root.glob(".*"))
    code, out, err = local(store, "install", first, "--activate", wheel=wheel)
    assert code == 0, err
    done = json.loads(out)
    assert done["active"] == store.current == done["version"] and done["figures"]["measured"]["tasks"]["t2i"]
    assert err.split()[:3] == ["verify", "plan", "transfer"]
    torn = bytearray(first.read_bytes())
    torn[-5000] ^= 1
    (tmp_path / "torn.mtu").write_bytes(torn)
    assert local(store, "install", tmp_path / "torn.mtu", wheel=wheel)[0] == 5
    code, _, err = local(store, "install", first, "--step-ms", 0.001, wheel=wheel)
    assert code == 3 and "0.001 are allowed" in err and store.current == done["version"]


@pytest.mark.heavy
def test_the_way_back_and_an_older_release(original: Path, tmp_path: Path) -> None:
    private, store = keys.new_private(), Store(tmp_path / "board")
    files = [packed(original, tmp_path, name, release, private) for release, name in enumerate(("one", "two"), 1)]
    wheel = next((tmp_path / "own").glob("*.whl"))
    public = tmp_path / "key.pub"
    public.write_text(keys.PublicKey.of(private, "us").line + "\n")
    local(store, "trust", public, wheel=wheel)
    active = []
    for file in files:
        code, out, err = local(store, "install", file, "--activate", wheel=wheel)
        assert code == 0, err
        active.append(json.loads(out)["active"])
    code, _, err = local(store, "install", files[0], "--activate", wheel=wheel)
    assert code == 5 and "older than 2" in err and store.current == active[1]
    done = subprocess.run(
        [store.root / "current" / "mtu-compile", "board", "local", "--root", store.root, "rollback"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and store.current == active[0], done.stderr
    status = json.loads(local(store, "status", wheel=wheel)[1])
    assert status["active"] == active[0] and status["highest_release"] == 2


def test_a_bundle_without_packages_for_this_python_says_how_to_put_them_in(original: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "board")
    delivery = version_of(original, tmp_path / "bare", tmp_path / "own")
    file = archive.pack(delivery.bundle, tmp_path / "bare.mtu")
    code, _, err = local(store, "install", file, "--unsigned", wheel=next((tmp_path / "own").glob("*.whl")))
    assert code == 1 and "boards wheels BUNDLE --for" in err and not list(store.root.glob(".*"))


def test_of_the_wheels_for_several_boards_those_are_taken_that_fit() -> None:
    names = [
        "wheels/numpy-2.2.6-cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
        "wheels/numpy-2.10.0-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
        "wheels/numpy-2.9.0-cp311-cp311-manylinux_2_28_aarch64.whl",
        "wheels/numpy-2.11.0-cp311-cp311-manylinux_2_38_aarch64.whl",
        "wheels/numpy-2.10.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "wheels/safetensors-0.8.0-cp38-abi3-manylinux2014_aarch64.whl",
        "wheels/h11-0.16.0-py3-none-any.whl",
        "wheels/future-1-cp312-abi3-manylinux2014_aarch64.whl",
        "wheels/typing_extensions-4.16.0-py2.py3-none-any.whl",
        "wheels/only-1-pp310-pypy310_pp73-manylinux2014_aarch64.whl",
        "wheels/notes.txt",
    ]
    found = fitting(names, python=(3, 11), glibc=(2, 36), machine="aarch64")
    assert [name.removeprefix("wheels/").split("-cp311-m")[0].split("-py")[0] for name in found] == [
        "h11-0.16.0",
        "numpy-2.10.0-cp311",
        "safetensors-0.8.0-cp38-abi3-manylinux2014_aarch64.whl",
        "typing_extensions-4.16.0",
    ]
    assert not fitting(names[:5], python=(3, 9), glibc=(2, 36), machine="aarch64")


def test_a_board_that_cannot_be_asked_is_described() -> None:
    assert System.parse("3.11-aarch64-2.36") == System("3.11", "2.36", "aarch64")
    for wrong in ("3.11", "3.11-aarch64", "2.7-x86_64-2.17", "3.11-aarch64-2.36;rm"):
        with pytest.raises(ConfigError, match="no board's Python"):
            System.parse(wrong)
