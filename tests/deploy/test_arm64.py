"""An arm64 board, imitated instruction by instruction: Debian's arm64 system in a folder, run by qemu's user emulation.

What it proves: the runtime's wheels for arm64 unpack and load there, and the pictures they make are x86's, within the
gate. Times mean nothing. Not the newest ONNX Runtime: 1.27 and later end by a signal under qemu 7.2, 1.24 to 1.26 do
not; all of them read ``/sys``, and abort where it is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mtu_compile import bundle
from mtu_compile.board.wheels import fitting
from mtu_compile.bundle import archive
from mtu_compile.deploy import packages
from mtu_compile.deploy.packages import System
from mtu_compile.stages import wheels
from tests.board import conftest as tiny
from tests.conftest import MadeOnce

DEBOOTSTRAP, QEMU = shutil.which("debootstrap") or "/usr/sbin/debootstrap", shutil.which("qemu-aarch64-static")
EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji" / "model"
#: Of Debian 12.
SYSTEM = System("3.11", "2.36", "aarch64")

#: Stands where Python is: programs of the folder are not this kernel's, so the emulator has to be named each time.
LAUNCHER = r"""
#include <stdlib.h>
#include <unistd.h>
int main(int count, char **given) {
    char **words = calloc(count + 8, sizeof(char *));
    int at = 0;
    words[at++] = "/qemu"; words[at++] = "-cpu"; words[at++] = "max,pauth-impdef=on";
    words[at++] = "-0"; words[at++] = "/usr/bin/python3"; words[at++] = "/usr/bin/python3.11";
    for (int i = 1; i < count; i++) words[at++] = given[i];
    execv(words[0], words);
    return 127;
}
"""
#: In a namespace of its own, so that nothing stays mounted.
ENTER = 'mount --rbind /sys $0/sys && mount --rbind /dev $0/dev && mount -t proc proc $0/proc && exec chroot $0 "$@"'


def missing() -> str | None:
    if os.geteuid() != 0:
        return "debootstrap and chroot need root"
    for name, found in (("debootstrap", Path(DEBOOTSTRAP).exists()), ("qemu-user-static", QEMU)):
        if not found:
            return f"{name} is not installed (apt-get install debootstrap qemu-user-static)"
    if not all(map(shutil.which, ("gcc", "dpkg", "unshare"))):
        return "gcc, dpkg or unshare is not installed"
    return None


def make_root(root: Path) -> None:
    """Debian 12 for arm64 with Python, unpacked and not set up: nothing of it has to run for that."""
    assert QEMU is not None
    words = ["--arch=arm64", "--foreign", "--variant=minbase", "--include=python3", "bookworm"]
    subprocess.run([DEBOOTSTRAP, *words, root], check=True, capture_output=True)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    shutil.copy(QEMU, root / "qemu")
    (root / "usr/bin/python3").unlink()
    gcc = ["gcc", "-static", "-x", "c", "-", "-o", root / "usr/bin/python3"]
    subprocess.run(gcc, input=LAUNCHER, text=True, check=True)


def on_board(root: Path, *words: str, path: str) -> str:
    """What Python of the folder prints."""
    environment = {"PATH": "/usr/bin", "HOME": "/root", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, str(root), "/usr/bin/python3"]
    where = {**environment, "PATH": os.environ["PATH"]}
    done = subprocess.run([*enter, *words], capture_output=True, text=True, check=False, env=where)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def example_in_int8(made_once: MadeOnce) -> Path:
    """The example's text-to-image for ONNX Runtime: INT8 whose activations are signed, as Arm multiplies them."""
    from mtu_compile.compile import BuildOptions, build

    def make(folder: Path) -> None:
        few = {"steps": 6, "calibration_pictures": 4, "check_pictures": 1, "gate": "warn"}
        build(BuildOptions(EXAMPLE, folder / "bundle", target="onnxruntime", tasks=("sr",), **few))

    return made_once("arm64-example", make) / "bundle"


#: What makes each bundle, a request to it, and what the newest ONNX Runtime has to be older than.
BUNDLES: dict[str, tuple[Callable[[MadeOnce], Path], tuple[str, ...], tuple[str, ...]]] = {
    "onnxruntime": (tiny.onnxruntime_bundle, ("--task", "t2i", "--prompt", "a red cat"), ("onnxruntime<1.27",)),
    "openvino": (tiny.openvino_bundle, ("--task", "t2i", "--prompt", "a red cat"), ()),
    "example-int8": (example_in_int8, ("--task", "sr", "--image", "/source.png"), ("onnxruntime<1.27",)),
}


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("name", BUNDLES)
def test_the_runtimes_wheels_run_on_arm64_and_make_x86s_pictures(
    name: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    make_bundle, request, constraint = BUNDLES[name]
    root, folder = tmp_path / "root", tmp_path / "bundle"
    made = made_once("arm64-root", lambda place: make_root(place / "root")) / "root"
    subprocess.run(["cp", "-a", made, root], check=True)  # which takes a device as one, and does not read it
    shutil.copytree(make_bundle(made_once), folder)
    manifest = bundle.read(folder)
    (folder / "wheels").mkdir()
    needed = (*packages.extras(manifest, SYSTEM.python), *constraint)
    for path in wheels.fetch_dependencies(folder / "wheels", SYSTEM.platforms, SYSTEM.python, extra=needed):
        assert "x86_64" not in path.name
    own = wheels.write_wheel(folder / "wheels")
    bundle.write(folder, manifest)
    archive.pack(folder, root / "bundle.mtu")
    shutil.copy(own, root / own.name)
    said = on_board(root, "-c", "import platform, sys; print(platform.machine(), *sys.version_info[:2])", path="")
    assert said.split() == ["aarch64", "3", "11"]
    local = ["-m", "mtu_compile.board.local", "--root", "/board", "install", "/bundle.mtu", "--unsigned", "--activate"]
    done = json.loads(on_board(root, *local, path=f"/{own.name}"))
    assert done["active"] == done["version"] and not done["figures"]["failures"]
    names = {
        Path(name).name
        for name in fitting(
            (str(one) for one in (folder / "wheels").iterdir()), python=(3, 11), glibc=(2, 36), machine="aarch64"
        )
    }
    (environment,) = (root / "board" / "environments").iterdir()
    assert set(json.loads((environment / "environment.json").read_text())["wheels"]) == names
    assert done["figures"]["facts"]["machine"] == "aarch64"
    shutil.copy(next(iter(sorted((EXAMPLE / "samples" / "sr").glob("*.png")))), root / "source.png")
    run = ["run", "/board/current/bundle", *request, "-o", "/out.png"]
    on_board(root, "-m", "mtu_compile", *run, path=f"/board/environments/{environment.name}/site")
    assert (root / "out.png").read_bytes().startswith(b"\x89PNG")
