"""A board's environment, for real: our wheel, the base dependencies and TensorRT-RTX, and nothing of the compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from PIL import Image

from mtu_compile.core.hashing import file_sha256
from mtu_compile.stages import wheels

#: What ``pip install mtu-compile`` brings that is imported on a board, and TensorRT-RTX in the place of JetPack's
#: TensorRT. cuda-python is left out: building for GPUs that are named has to do without.
ALLOWED = (
    *("numpy", "pillow", "tokenizers", "safetensors", "click", "rich", "markdown-it-py", "mdurl", "pygments"),
    *("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
)
#: A board without any vendor's own runtime.
PORTABLE = (*(name for name in ALLOWED if not name.startswith("tensorrt")), "onnxruntime", "flatbuffers", "archspec")
FORBIDDEN = ("torch", "onnx", "onnxruntime", "polygraphy", "skimage", "nncf", "openvino", "diffusers", "cuda", "scipy")


def expose(names: tuple[str, ...], folder: Path) -> None:
    """Link the installed distributions ``names``, and nothing else, into ``folder``."""
    folder.mkdir()
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a virtual environment without a compiler."""
    return environment_of(tmp_path_factory.mktemp("bare"), ALLOWED)


def environment_of(root: Path, packages: tuple[str, ...]) -> Path:
    """A virtual environment in ``root`` with our wheel and ``packages``; returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    programs = root / "venv" / "bin"
    wheel = wheels.write_wheel(root)
    pip = [sys.executable, "-m", "pip", f"--python={programs / 'python'}", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--disable-pip-version-check", str(wheel)], check=True)
    expose(packages, root / "allowed")
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site / "allowed.pth").write_text(f"{root / 'allowed'}\n")
    return programs


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def run(bare: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(bare / "mtu-compile"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment(), cwd=bare
    )


def test_the_environment_is_bare(bare: Path) -> None:
    code = (
        "import importlib.util, json, mtu_compile\n"
        f"found = [n for n in {FORBIDDEN!r} if importlib.util.find_spec(n)]\n"
        "print(json.dumps([found, mtu_compile.__file__]))"
    )
    done = subprocess.run(
        [bare / "python", "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=bare
    )
    found, place = json.loads(done.stdout)
    assert found == []
    assert place.startswith(str(bare.parent))


def test_engines_are_built_killed_truncated_and_continued(bare: Path, make_bundle: Callable[..., Path]) -> None:
    root = make_bundle(layers=300)  # the two UNets take more than a second each
    index = root / "built" / "index.json"

    def recorded() -> dict[str, dict[str, str]]:
        engines: dict[str, dict[str, str]] = json.loads(index.read_text())["engines"] if index.exists() else {}
        return engines

    first = subprocess.Popen(
        [bare / "mtu-compile", "board", "build", root], env=environment(), cwd=bare, stderr=subprocess.PIPE, text=True
    )
    while len(recorded()) < 3 and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    _, errors = first.communicate()
    before = recorded()
    assert first.returncode == -signal.SIGKILL, errors
    assert 3 <= len(before) < 5, errors
    kept = root / before["text_encoder/model.onnx"]["engine"]
    untouched = kept.stat().st_mtime_ns

    broken = root / before["vae_decoder/model.onnx"]["engine"]
    with broken.open("r+b") as file:
        file.truncate(1000)

    shown = json.loads(run(bare, "board", "info", root, "--json").stdout)["bundle"]
    states = {one["graph"]: one["state"] for one in shown["engines"]}
    assert states["text_encoder/model.onnx"] == "built"
    assert states["vae_decoder/model.onnx"] == states["unet_edit/model.onnx"] == "to be built"

    second = run(bare, "board", "build", root, "--json")
    assert second.returncode == 0, second.stderr
    engines = {one["graph"]: one for one in json.loads(second.stdout)["engines"]}
    assert len(engines) == 5
    assert {graph for graph, one in engines.items() if one["reused"]} == set(before) - {"vae_decoder/model.onnx"}
    assert kept.stat().st_mtime_ns == untouched
    for one in recorded().values():
        assert file_sha256(root / one["engine"]) == one["engine_sha256"]
    assert not list((root / "built").glob(".*"))

    third = run(bare, "board", "build", root)
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("was there") == 5


def test_what_is_missing_is_said_without_a_traceback(bare: Path, make_bundle: Callable[..., Path]) -> None:
    here = run(bare, "board", "info")
    assert here.returncode == 0, here.stderr
    assert "cuda-python is not installed" in here.stdout
    jetson = run(bare, "board", "build", make_bundle("tensorrt", {"compute_capabilities": "8.7"}, name="jetson"))
    assert jetson.returncode == 4
    assert "tensorrt cannot be imported" in jetson.stderr and "JetPack" in jetson.stderr
    openvino = run(bare, "board", "build", make_bundle("openvino", {}, name="cpu"))
    assert openvino.returncode == 1 and "nothing of this bundle is built on a board" in openvino.stderr
    for command in ("build", "check"):
        assert run(bare, "board", command, bare).returncode == 5  # not a bundle


def test_a_bundle_for_any_cpu_runs_and_is_checked_with_onnx_runtime_alone(checked: Path, tmp_path: Path) -> None:
    portable = environment_of(tmp_path, PORTABLE)
    code = f"import importlib.util, json; print([n for n in {FORBIDDEN!r} if importlib.util.find_spec(n)])"
    here = subprocess.run(
        [portable / "python", "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=portable
    )
    assert here.stdout.split() == ["['onnxruntime']"]
    done = run(portable, "run", checked, "--task", "t2i", "--prompt", "a red cat", "-o", tmp_path / "cat.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (32, 32)
    verdict = run(portable, "board", "check", checked, "--json")
    assert verdict.returncode == 0, verdict.stderr
    assert json.loads(verdict.stdout)["measured_with"] == "onnxruntime, on this machine's own device"
