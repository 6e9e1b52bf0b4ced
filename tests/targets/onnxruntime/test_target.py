"""ONNX Runtime as a target: one graph for every CPU, its layers' times, and INT8 sums that do not overflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import targets
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import BuildError, ConfigError, ToolchainMissing
from mtu_compile.runtime import cpu_isa
from mtu_compile.runtime.engine import open_engine
from targets.costs.layers import compare_costs
from targets.onnxruntime import engine as engine_module
from targets.onnxruntime.costs import read_profile
from targets.onnxruntime.engine import saturates
from targets.onnxruntime.target import ONNXRUNTIME


def write(path: Path, *, int8: bool, loud: bool = False) -> Path:
    """conv → gelu → linear of 64 channels; Q/DQ as NNCF places them, signed and symmetric; ``loud`` weights overflow
    sums in 16 bits."""
    rng = np.random.default_rng(0)
    weights = {"conv": rng.standard_normal((64, 64, 3, 3)) * 0.05, "linear": rng.standard_normal((64, 64)) * 0.1}
    if loud:
        weights["linear"] = rng.uniform(0.5, 1, (64, 64)) * rng.choice([-1, 1], (1, 64))
    constants: dict[str, Any] = {"flat": np.array([2, 64, 64], np.int64), "x_scale": np.float32(0.02)}
    constants["zero"] = np.array(0, np.int8)
    nodes = []

    def layer(op: str, name: str, x: str, y: str, axis: int, **attributes: Any) -> None:
        array, places = weights[name], tuple(i for i in range(weights[name].ndim) if i != axis)
        scale = (np.abs(array).max(axis=places) / 127).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        steps = np.clip(np.rint(array / scale.reshape(shape)), -127, 127).astype(np.int8)
        if not int8:
            constants[f"{name}.w"] = (steps * scale.reshape(shape)).astype(np.float32)
            nodes.append(helper.make_node(op, [x, f"{name}.w"], [y], name=name, **attributes))
            return
        constants.update({f"{name}.i": steps, f"{name}.s": scale, f"{name}.z": np.zeros(len(scale), np.int8)})
        for kind, takes, gives in (
            ("QuantizeLinear", x, f"{name}.q"),
            ("DequantizeLinear", f"{name}.q", f"{name}.d"),
        ):
            nodes.append(helper.make_node(kind, [takes, "x_scale", "zero"], [gives], name=gives))
        takes = [f"{name}.i", f"{name}.s", f"{name}.z"]
        nodes.append(helper.make_node("DequantizeLinear", takes, [f"{name}.w"], axis=axis, name=f"{name}.w"))
        nodes.append(helper.make_node(op, [f"{name}.d", f"{name}.w"], [y], name=name, **attributes))

    layer("Conv", "conv", "sample", "c", 0, pads=[1, 1, 1, 1])
    nodes.append(helper.make_node("Gelu", ["c"], ["g"], name="gelu"))
    nodes.append(helper.make_node("Reshape", ["g", "flat"], ["r"], name="reshape"))
    layer("MatMul", "linear", "r", "out_sample", 1)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("sample", 1, [2, 64, 8, 8])],
        [helper.make_tensor_value_info("out_sample", 1, [2, 64, 64])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


FEED = {"sample": np.abs(np.random.default_rng(1).standard_normal((2, 64, 8, 8), dtype=np.float32))}


def exactly(graph: Path) -> np.ndarray:
    """What the nodes of the graph say, one by one, none fused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, FEED)[0]
    return result


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_build_is_the_graph_and_computes_what_its_nodes_say(tmp_path: Path, precision: Any) -> None:
    graph = write(tmp_path / "graph.onnx", int8=precision == "int8")
    artifact = ONNXRUNTIME.build(graph, tmp_path / "out", precision=precision)
    assert [path.name for path in artifact.files] == ["model.onnx"] and artifact.prebuilt is None
    assert artifact.toolchain.startswith("onnxruntime ") and dict(artifact.config) == {}
    engine = open_engine(artifact.kind, artifact.path, artifact.config)
    assert sqnr_db(exactly(graph), engine(FEED)["out_sample"]) > 40  # a step of INT8 may fall to the other side


def test_it_runs_on_the_machines_own_cpu_and_says_so() -> None:
    ref = EngineRef("onnxruntime", "unet/model.onnx", {})
    assert ONNXRUNTIME.device_here() and ONNXRUNTIME.host_engine(ref) == ref
    assert ONNXRUNTIME.measured_with(ref, on_device=True).startswith("onnxruntime 1.")
    assert ONNXRUNTIME.companion_precision("int8") == "fp32"
    assert (ONNXRUNTIME.memory() or 0) > 1 << 30


def test_what_it_cannot_read_leaves_nothing(tmp_path: Path) -> None:
    graph = write(tmp_path / "graph.onnx", int8=False)
    model = onnx.load(graph)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "NoSuchOperator", "nowhere"
    onnx.save(model, graph)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        ONNXRUNTIME.check_graph(graph, precision="fp32")
    with pytest.raises(BuildError, match="NoSuchOperator"):
        ONNXRUNTIME.build(graph, tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="fp16"):
        ONNXRUNTIME.build(graph, tmp_path / "out", precision="fp16")


def test_without_onnxruntime_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graph = write(tmp_path / "graph.onnx", int8=False)
    assert not ONNXRUNTIME.device_here()
    for attempt in (
        lambda: ONNXRUNTIME.build(graph, tmp_path / "out", precision="fp32"),
        lambda: open_engine("onnxruntime", graph, {}),
    ):
        with pytest.raises(ToolchainMissing) as caught:
            attempt()
        assert caught.value.hint == "pip install 'mtu-compile[onnxruntime]'"


def test_options_of_onnx_runtime_do_not_come_from_a_bundle(tmp_path: Path) -> None:
    graph = write(tmp_path / "graph.onnx", int8=False)
    with pytest.raises(ConfigError, match=r"may not set .* 'session.x64quantprecision'"):
        open_engine("onnxruntime", graph, {"session.x64quantprecision": "0"})


def test_every_layer_is_timed_in_float_and_in_int8(tmp_path: Path) -> None:
    graphs = [write(tmp_path / f"{int8}.onnx", int8=int8) for int8 in (False, True)]
    costs = compare_costs(ONNXRUNTIME, *graphs, rounds=5)
    assert costs is not None and costs.measured and list(costs.layers) == ["conv", "linear"]
    assert all(spent > 0 for layer in costs.layers.values() for spent in layer)
    assert "onnxruntime 1." in costs.source
    for one in (costs.float_costs, costs.int8_costs):
        assert one.attributed_ms == pytest.approx(one.total_ms)
    with pytest.raises(ConfigError, match="0 rounds"):
        ONNXRUNTIME.layer_costs(graphs[0], precision="fp32", rounds=0)


def test_a_profile_is_read_run_by_run(tmp_path: Path) -> None:
    """Two runs of three kernels, of which two have one name."""
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "dur": 1000}]
    for run in (0, 1):
        events += [{"cat": "Node", "name": f"{name}_kernel_time", "dur": 10 + run} for name in ("a", "b", "b")]
        events.append({"cat": "Session", "name": "model_run", "dur": 100})
    (tmp_path / "profile.json").write_text(json.dumps(events))
    spent = read_profile(tmp_path / "profile.json", ["b", "a", "b", "folded away"])
    np.testing.assert_array_equal(spent, [[10, 10, 10, 0], [11, 11, 11, 0]])


def test_a_quantised_linear_layer_with_a_bias_is_one_product_of_bytes(tmp_path: Path) -> None:
    graph = write(tmp_path / "graph.onnx", int8=True)
    model = onnx.load(graph)
    model.graph.node[-1].output[0] = "product"
    model.graph.node.append(helper.make_node("Add", ["product", "bias"], ["out_sample"], name="add"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(64, 0.5, np.float32), "bias"))
    onnx.save(model, graph)
    options = engine_module.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    engine_module.open_session(graph, options)
    found = {node.name: node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert found["linear"] == "MatMulIntegerToFloat"


@pytest.mark.parametrize(
    ("level", "expected"),
    [("AVX2", True), ("AVX512_CORE", True), ("unknown", True), (cpu_isa.BELOW, True)]
    + [(level, False) for level in ("AVX2_VNNI", "AVX512_CORE_VNNI", "AVX512_CORE_AMX", "aarch64")],
)
def test_sums_in_16_bits_are_avoided_where_the_cpu_would_make_them(level: str, expected: bool) -> None:
    assert saturates(level) is expected
    assert set(engine_module.VNNI) < set(cpu_isa.LEVELS)


def test_loud_int8_weights_are_right_on_this_cpu_whichever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = write(tmp_path / "graph.onnx", int8=True, loud=True)
    wanted = exactly(graph)
    as_told: Callable[[], str] = cpu_isa.level
    for level in (as_told, lambda: "AVX2"):
        monkeypatch.setattr(engine_module.cpu_isa, "level", level)
        engine = open_engine("onnxruntime", graph, {})
        assert sqnr_db(wanted, engine(FEED)["out_sample"]) > 40
        engine.close()


def test_it_is_a_target_by_name() -> None:
    assert targets.get("onnxruntime") is ONNXRUNTIME
