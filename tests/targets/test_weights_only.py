"""Graphs with INT8 and INT4 weights, by the real NNCF, through every family of targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import passes
import targets
from calibration.compress import CompressSettings, compress_onnx
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.precision import WEIGHTS_ONLY
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import open_engine
from targets.base import Artifact
from targets.costs.estimate import footprint
from targets.openvino.host import FLOAT_ACTIVATIONS

C, TOKENS = 512, 64
#: What weights take of their bytes in float32; INT4 leaves the convolution and the last linear layer in INT8.
SHARES = {"int8-weights": 1 / 4, "int4-weights": 1 / 5}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """By precision (``"fp32"``: as it was), conv_in → conv → two linear layers of 512 channels → conv_out."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("weights")
    values: dict[str, Any] = {
        "w_in": rng.standard_normal((C, 4, 3, 3)) / 6,
        "w": rng.standard_normal((C, C, 1, 1)) / 23,
        "w_up": rng.standard_normal((C, 2 * C)) / 23,
        "w_down": rng.standard_normal((2 * C, C)) / 32,
        "w_last": rng.standard_normal((C, C)) / 23,
        "w_out": rng.standard_normal((4, C, 3, 3)) / 68,
    }
    values = {name: array.astype(np.float32) for name, array in values.items()}
    values |= {"rows": np.array([1, C, TOKENS]), "picture": np.array([1, C, 8, 8])}
    nodes = [
        helper.make_node("Conv", ["sample", "w_in"], ["a"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv"),
        helper.make_node("Reshape", ["b", "rows"], ["c"], name="rows"),
        helper.make_node("Transpose", ["c"], ["d"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["d", "w_up"], ["e"], name="up"),
        helper.make_node("Relu", ["e"], ["f"], name="relu"),
        helper.make_node("MatMul", ["f", "w_down"], ["g"], name="down"),
        helper.make_node("MatMul", ["g", "w_last"], ["h"], name="last"),
        helper.make_node("Transpose", ["h"], ["i"], name="back", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["i", "picture"], ["j"], name="picture"),
        helper.make_node("Conv", ["j", "w_out"], ["out_sample"], name="conv_out", pads=[1, 1, 1, 1]),
    ]
    border = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in ("sample", "out_sample")]
    constants = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "g", border[:1], border[1:], constants)
    found = {"fp32": folder / "model.onnx"}
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(found["fp32"]))
    for precision, mode in zip(WEIGHTS_ONLY, ("int8", "int4"), strict=True):
        found[precision] = folder / f"{mode}.onnx"
        compress_onnx(found["fp32"], found[precision], settings=CompressSettings(mode))  # type: ignore[arg-type]
    return found


def build(name: str, graph: Path, out: Path, precision: Any) -> Artifact:
    """Lower and build, as the compiler does."""
    target, lowered = targets.get(name), out.with_suffix(".onnx")
    if not passes.run_pipeline(graph, lowered, target.spec.lowering.get(precision, ()), passes.PassContext()):
        lowered = graph
    return target.build(lowered, out, precision=precision)


def on_host(name: str, artifact: Artifact) -> Any:
    ref = EngineRef(artifact.kind, str(artifact.path), artifact.config)
    host = targets.get(name).host_engine(ref)
    feed = {"sample": np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)}
    return open_engine(host.kind, Path(host.path), host.config)(feed)["out_sample"]


@pytest.mark.parametrize("precision", WEIGHTS_ONLY)
@pytest.mark.parametrize("name", ["cpu", "intel-gpu", "jetson-orin"])
def test_the_file_shrinks_and_the_graph_computes_the_same(
    graphs: Mapping[str, Path], tmp_path: Path, name: str, precision: Any
) -> None:
    wanted = on_host(name, build(name, graphs["fp32"], tmp_path / "float", "fp32"))
    artifact = build(name, graphs[precision], tmp_path / "out", precision)
    whole = sum(file.stat().st_size for file in artifact.files)
    assert whole < 1.1 * SHARES[precision] * graphs["fp32"].stat().st_size
    assert sqnr_db(wanted, on_host(name, artifact)) > (30 if precision == "int8-weights" else 12)
    if name != "jetson-orin":
        assert artifact.config.items() >= FLOAT_ACTIVATIONS.items()


def test_an_rtx_engine_holds_the_integers(graphs: Mapping[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    sizes = {}
    for precision, graph in (("fp16", graphs["fp32"]), *((p, graphs[p]) for p in WEIGHTS_ONLY)):
        artifact = build("rtx-ada", graph, tmp_path / precision, precision)
        assert artifact.prebuilt is not None
        sizes[precision] = artifact.prebuilt.stat().st_size
    numbers = 4 * C * C  # of the linear layers that become INT4 in INT4
    assert sizes["fp16"] - sizes["int8-weights"] > 0.8 * numbers
    assert sizes["int8-weights"] - sizes["int4-weights"] > 0.4 * numbers


@pytest.mark.parametrize("precision", WEIGHTS_ONLY)
def test_a_float_graph_is_planned_as_what_it_becomes(graphs: Mapping[str, Path], precision: Any) -> None:
    planned, real = (footprint(graph_io.load(graphs[which]), precision=precision) for which in ("fp32", precision))
    # Zero points, which engines drop; and the last linear layer, which a plan does not know to be the last.
    assert planned.weights_bytes < real.weights_bytes < 1.15 * planned.weights_bytes
    half = footprint(graph_io.load(graphs["fp32"]), precision="fp16")
    assert planned.activation_bytes == half.activation_bytes
    assert planned.weights_bytes < 1.1 * 2 * SHARES[precision] * half.weights_bytes


def test_int4_is_not_for_npus() -> None:
    for name in targets.names():
        if name.startswith("intel-npu"):
            with pytest.raises(ConfigError, match="cannot be built in int4-weights"):
                targets.get(name).spec.check_precision("int4-weights")
            targets.get(name).spec.check_precision("int8-weights")
