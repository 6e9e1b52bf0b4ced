"""Building on the board: what cannot work is refused with the reason, what is interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.board import Board, build_bundle
from mtu_compile.board import build as module
from mtu_compile.core.errors import BundleError, MtuError, TargetError, ToolchainMissing
from mtu_compile.core.progress import Advance, Progress
from mtu_compile.runtime import built
from mtu_compile.runtime.builder import Built, Host
from targets.nvidia import board as nvidia
from targets.nvidia.board import NvidiaMachine
from targets.nvidia.cuda import Device

GPU = Device("Orin", "8.7", 64 << 30, 50 << 30, "12.6")
HOST = Host("NVIDIA Jetson AGX Orin", "3.10", 50 << 30)
RECIPE = {"compute_capabilities": "8.7", "workspace_bytes": "1073741824"}
JETPACK = {"version": ["6.1", "6.2"], "tensorrt": "10.3", "python": "3.10"}
REQUIRED = {"compute_capability": "8.7", "tensorrt": ["10.3", "11.4"], "python": ["3.10"], "jetpack": [JETPACK]}
MACHINE = NvidiaMachine(HOST, "R36 (release)", GPU, {"tensorrt": "10.3.0"}, {})
ORIN = Board(HOST, {"tensorrt": MACHINE, "tensorrt-rtx": MACHINE})
GRAPHS = ["text_encoder", "vae_encoder", "vae_decoder", "unet", "unet_edit"]


class Builder:
    """Stands for TensorRT on a board, which is not here: writes the graph's name and counts."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.fails_at: str | None = None
        self.error: BaseException = KeyboardInterrupt()

    def __call__(self, graph: Path, out: Path, recipe: Any, *, kind: str, timing_cache: Path, advance: Any) -> Built:
        name = graph.parent.name
        if name == self.fails_at:
            raise self.error
        self.built.append(name)
        advance(1)
        out.write_bytes(f"engine of {name} {len(self.built)}".encode())
        return Built(out, 0.5, out.stat().st_size, "tensorrt 10.3.0")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    fake = Builder()
    monkeypatch.setattr(nvidia, "build_engine", fake)
    monkeypatch.setattr(module, "probe", lambda: ORIN)
    return fake


@pytest.fixture
def orin_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle("tensorrt", RECIPE, board=REQUIRED)


def use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Board:
    host = replace(HOST, **{key: changes.pop(key) for key in ("python", "available_bytes") if key in changes})
    machine = replace(MACHINE, host=host, **changes)
    board = Board(host, {"tensorrt": machine, "tensorrt-rtx": machine})
    monkeypatch.setattr(module, "probe", lambda: board)
    return board


def test_every_graph_is_built_once_recorded_and_found(orin_bundle: Path, builder: Builder) -> None:
    result = build_bundle(orin_bundle)
    assert builder.built == GRAPHS
    assert [one.graph for one in result.engines] == [f"{name}/model.onnx" for name in GRAPHS]
    assert result.reused == () and result.notes == ()
    manifest = bundle.read(orin_bundle)
    for _, ref in manifest.engines():
        assert built.find(orin_bundle, manifest, ref, ORIN.fingerprint("tensorrt"))


def test_the_second_time_nothing_is_built_unless_forced(orin_bundle: Path, builder: Builder) -> None:
    build_bundle(orin_bundle)
    again = build_bundle(orin_bundle)
    assert len(builder.built) == len(GRAPHS) == len(again.reused) == len(again.engines)
    assert len(build_bundle(orin_bundle, force=True).engines) == len(GRAPHS)
    assert builder.built == GRAPHS * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TargetError("out of memory")])
def test_an_interrupted_build_goes_on_where_it_stopped(orin_bundle: Path, builder: Builder, error: Any) -> None:
    builder.fails_at, builder.error = "unet", error
    with pytest.raises(type(error)):
        build_bundle(orin_bundle)
    builder.fails_at = None
    result = build_bundle(orin_bundle)
    assert builder.built == GRAPHS
    assert result.reused == tuple(f"{name}/model.onnx" for name in GRAPHS[:3])


def test_a_broken_engine_and_a_foreign_one_are_built_again(
    orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bundle(orin_bundle)
    engine = orin_bundle / "built" / "vae_decoder.engine"
    engine.write_bytes(engine.read_bytes()[:5])
    for leftover in (".unet.engine.0badcafe.engine", ".unet.engine.0badcafe.lock"):
        (orin_bundle / "built" / leftover).write_bytes(b"left by a killed build")
    build_bundle(orin_bundle)
    assert builder.built == [*GRAPHS, "vae_decoder"]
    assert not list((orin_bundle / "built").glob(".*"))
    (orin_bundle / "built" / "index.json").write_text("{")
    build_bundle(orin_bundle)
    assert builder.built == [*GRAPHS, "vae_decoder", *GRAPHS]
    use(monkeypatch, tensorrt={"tensorrt": "10.16.2"})  # JetPack was updated
    build_bundle(orin_bundle)
    assert builder.built == [*GRAPHS, "vae_decoder", *GRAPHS, *GRAPHS]


def test_another_gpu_is_refused(orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, gpu=replace(GPU, name="Xavier", compute_capability="7.2"))
    with pytest.raises(TargetError, match=r"compute capability 8\.7, and the GPU here, Xavier, has 7\.2"):
        build_bundle(orin_bundle)
    assert not builder.built


def test_without_a_gpu_or_a_library_the_reason_is_theirs(
    orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, gpu=None, missing={"gpu": TargetError("no NVIDIA GPU on this machine")})
    with pytest.raises(TargetError, match="no NVIDIA GPU"):
        build_bundle(orin_bundle)
    missing = ToolchainMissing("tensorrt cannot be imported", hint="sudo apt install nvidia-jetpack")
    use(monkeypatch, tensorrt={}, missing={"tensorrt": missing})
    with pytest.raises(ToolchainMissing) as caught:
        build_bundle(orin_bundle)
    assert caught.value.exit_code == 4
    assert not builder.built


def test_tensorrt_too_old_is_refused_and_newer_is_noted(
    orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tensorrt={"tensorrt": "8.6.2"})
    with pytest.raises(TargetError, match=r"needs TensorRT 10\.3 or newer, and here is 8\.6\.2") as caught:
        build_bundle(orin_bundle)
    assert caught.value.hint == "update JetPack: 6.1 to 6.2 bring TensorRT 10.3 or newer"
    assert not builder.built
    use(monkeypatch, tensorrt={"tensorrt": "11.5.0"}, python="3.13")
    notes = build_bundle(orin_bundle).notes
    assert len(notes) == 2 and "newer than 11.4" in notes[0] and "Python 3.13" in notes[1]
    use(monkeypatch, tensorrt={"tensorrt": "11.4.1.5"})
    assert build_bundle(orin_bundle).notes == ()


def test_too_little_memory_is_refused_as_an_estimate_and_can_be_ignored(
    orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, available_bytes=100_000)
    with pytest.raises(TargetError, match=r"unet.*an estimate: 4 times the graph.* are free") as caught:
        build_bundle(orin_bundle)
    assert "--ignore-memory" in str(caught.value.hint)
    assert not builder.built
    assert len(build_bundle(orin_bundle, ignore_memory=True).engines) == len(GRAPHS)


def test_the_memory_of_a_gpu_counts_but_a_jetson_shares_it(
    orin_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = replace(GPU, free_bytes=1000)
    use(monkeypatch, gpu=full, jetson_linux=None)
    with pytest.raises(TargetError, match="GPU's memory"):
        build_bundle(orin_bundle)
    use(monkeypatch, gpu=full)
    build_bundle(orin_bundle)


def test_a_bundle_with_nothing_to_build_says_so(make_bundle: Callable[..., Path], builder: Builder) -> None:
    with pytest.raises(TargetError, match=r"nothing of this bundle is built on a board.*openvino"):
        build_bundle(make_bundle("openvino", {}))


def test_a_damaged_bundle_is_refused_before_anything_is_built(orin_bundle: Path, builder: Builder) -> None:
    graph = orin_bundle / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match="unet/model"):
        build_bundle(orin_bundle)
    assert not builder.built and not (orin_bundle / "built").exists()


def test_two_builds_at_once_are_refused(orin_bundle: Path, builder: Builder) -> None:
    class Second(Progress):
        """Starts another build while the first one builds."""

        @contextmanager
        def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
            if title == "build unet/model.onnx":
                with pytest.raises(MtuError, match="another build of this bundle is running"):
                    build_bundle(orin_bundle)
            yield lambda units: None

    build_bundle(orin_bundle, progress=Second())
    assert builder.built == GRAPHS


def test_engines_the_bundle_brings_are_not_built(make_bundle: Callable[..., Path], builder: Builder) -> None:
    root = make_bundle("tensorrt", RECIPE)
    (root / "unet" / "model.engine").write_bytes(b"engine")
    manifest = bundle.read(root, verify=False)
    entry = manifest.tasks["t2i"]
    ref = replace(entry.engine, prebuilt="unet/model.engine")
    bundle.write(root, replace(manifest, tasks={**manifest.tasks, "t2i": replace(entry, engine=ref)}))
    build_bundle(root)
    assert "unet" not in builder.built
    build_bundle(root, force=True)
    assert "unet" in builder.built


def test_without_a_gpu_tensorrt_rtx_really_builds_for_gpus_that_are_named(make_bundle: Callable[..., Path]) -> None:
    root = make_bundle()
    result = build_bundle(root)
    assert [one.toolchain.split()[0] for one in result.engines] == ["tensorrt_rtx"] * len(GRAPHS)
    assert all((root / one.engine).stat().st_size == one.bytes > 10_000 for one in result.engines)
    assert json.loads((root / "built" / "index.json").read_text())["format"] == built.FORMAT
    bundle.read(root)


def test_a_graph_that_is_refused_keeps_what_was_built_before(make_bundle: Callable[..., Path]) -> None:
    import onnx

    root = make_bundle()
    path = root / "unet" / "model.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "NoSuchOperator", "nowhere"
    onnx.save(model, path)
    bundle.write(root, bundle.read(root, verify=False))
    with pytest.raises(TargetError, match="NoSuchOperator"):
        build_bundle(root)
    assert sorted(built.read_index(root)) == [f"{name}/model.onnx" for name in sorted(GRAPHS[:3])]
