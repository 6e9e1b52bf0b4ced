"""Jetson boards: what is said of them, and the graph and recipe a bundle takes to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import targets
from mtu_compile.board.build import check_board
from mtu_compile.bundle import BuildProvenance, EngineRef, EngineState
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.core.errors import BuildError, ConfigError, TargetError
from mtu_compile.core.schema import conform
from mtu_compile.stages import wheels
from targets.nvidia.builder import Recipe
from targets.nvidia.jetson import JetsonSpec

BOARDS = ("jetson-orin", "jetson-orin-nx", "jetson-orin-nano", "jetson-thor")


def spec_of(name: str) -> JetsonSpec:
    spec = targets.get(name).spec
    assert isinstance(spec, JetsonSpec)
    return spec


@pytest.mark.parametrize("name", BOARDS)
def test_every_number_has_its_source(name: str) -> None:
    spec = spec_of(name)
    numbers = {"opset", "precisions", "memory_bytes", "reserved_bytes", "compute_capabilities", "workspace_bytes"}
    assert {*numbers, "jetpacks", "kind"} <= set(spec.sources)
    assert spec.kind == "tensorrt" and spec.built == "board"
    assert spec.memory_bytes is not None and spec.workspace_bytes is not None
    assert spec.reserved_bytes + spec.workspace_bytes < spec.memory_bytes
    assert set(spec.precisions) <= set(spec.lowering)
    assert all(jetpack.source for jetpack in spec.jetpacks)


def test_only_thor_has_fp8() -> None:
    for name in BOARDS[:3]:
        assert spec_of(name).compute_capabilities == ("8.7",)
        with pytest.raises(ConfigError, match="fp8"):
            spec_of(name).check_precision("fp8")
        for precision in ("int8", "fp16", "fp32"):
            spec_of(name).check_precision(precision)
    assert spec_of("jetson-thor").compute_capabilities == ("11.0",)
    spec_of("jetson-thor").check_precision("fp8")


@pytest.mark.parametrize("name", BOARDS)
def test_what_a_board_needs_is_plain_json_that_the_board_and_pip_understand(name: str) -> None:
    requirements = spec_of(name).board_requirements()
    assert json.loads(json.dumps(requirements)) == requirements
    oldest, newest = (tuple(int(part) for part in version.split(".")) for version in requirements["tensorrt"])
    assert (10, 3) == oldest < newest == (11, 4)
    for system in requirements["jetpack"]:
        assert system["python"] in requirements["python"]
        assert wheels.manylinux(system["glibc"], system["machine"])
        assert [package.startswith("cuda-python==") for package in system["packages"]] == [True]


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_is_needed_to_make_the_bundle(name: str) -> None:
    available = targets.get(name).probe()
    assert available.ok
    assert "board" in available.detail


def test_what_is_built_here_is_the_graph_and_the_recipe(unet_like: Path, tmp_path: Path) -> None:
    spec = spec_of("jetson-orin-nano")
    artifact = targets.get("jetson-orin-nano").build(unet_like, tmp_path / "out", precision="fp16")
    assert (artifact.kind, artifact.prebuilt, artifact.estimate) == ("tensorrt", None, None)
    assert (artifact.state, artifact.reason) == (EngineState.ON_BOARD, None)
    assert artifact.path == tmp_path / "out" / "model.onnx"
    assert Recipe.from_config(artifact.config) == Recipe(
        workspace_bytes=spec.workspace_bytes, compute_capabilities=("8.7",)
    )
    assert not list((tmp_path / "out").glob("*.engine"))


def test_the_parser_of_tensorrt_rtx_stands_in_for_the_boards(unet_like: Path) -> None:
    import onnx

    target = targets.get("jetson-orin")
    target.check_graph(unet_like, precision="fp16")
    model = onnx.load(unet_like)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "NoSuchOperator", "nowhere"
    onnx.save(model, unet_like)
    with pytest.raises(BuildError, match="conv_out"):
        target.check_graph(unet_like, precision="fp16")


def test_without_the_board_the_graph_runs_on_onnx_runtime() -> None:
    target = targets.get("jetson-orin")
    assert not target.device_here()
    engine = EngineRef("tensorrt", "unet/model.onnx", {"compute_capabilities": "8.7"})
    assert (target.host_engine(engine).kind, target.host_engine(engine).path) == ("onnxruntime", "unet/model.onnx")


def test_the_board_refuses_a_tensorrt_older_than_the_target_says() -> None:
    from mtu_compile.board.machine import Board
    from mtu_compile.runtime.builder import Host
    from targets.nvidia.board import NvidiaMachine
    from targets.nvidia.cuda import Device

    class Manifest:
        """As much of one as the check reads."""

        target = "jetson-orin"

        def __init__(self) -> None:
            board = conform(BoardRequirements, spec_of("jetson-orin").board_requirements())
            self.provenance = BuildProvenance(board=board)

        def engines(self) -> Any:
            yield "tasks.t2i.engine", EngineRef("tensorrt", "unet/model.onnx", {"compute_capabilities": "8.7"})

    def board(tensorrt: str = "10.3.0", python: str = "3.10") -> Board:
        host = Host(None, python, 1 << 35)
        gpu = Device("Orin", "8.7", 64, 64, "12.6")
        return Board(host, {"tensorrt": NvidiaMachine(host, "R36", gpu, {"tensorrt": tensorrt}, {})})

    assert check_board(Manifest(), board()) == ()  # type: ignore[arg-type]
    assert check_board(Manifest(), board("10.16.2.10", "3.12")) == ()  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"TensorRT 10\.3 or newer") as caught:
        check_board(Manifest(), board("8.5.2"))  # type: ignore[arg-type]
    assert "6.1 to 6.2 bring TensorRT 10.3" in str(caught.value.hint)
