from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from mtu_compile.core.errors import ConfigError, ModelError
from targets.base import LayerCosts
from targets.costs.layers import ComparedCosts, Kernel, charge, compare_costs, read_layers
from targets.costs.timing import undisturbed
from targets.openvino.costs import of_each_run

LAYERS = ("conv_in", "to_q", "to_k", "scores", "weighted", "to_out", "conv_out")


def write_graph(path: Path, *, quantised: bool, names: tuple[str, ...] = LAYERS, batch: int = 1) -> Path:
    """conv → norm → attention over 64 pixels of 32 channels → conv; weights and, on request, two inputs quantised.

    ``to_q`` and ``to_k`` share an input; ``to_out`` has a bias in an Add of its own.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: dict[str, Any] = {
        "to_rows": np.array([batch, 32, 64]),
        "to_image": np.array([batch, 32, 8, 8]),
        "bias": np.ones(32, np.float32),
        "half": np.array(0.5, np.float32),
        "s": np.array(0.03, np.float32),
        "zero": np.array(0, np.int8),
    }

    def add(kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))

    def activation(value: str) -> str:
        if not quantised:
            return value
        if not any(f"{value}_dq" in node.output for node in nodes):
            add("QuantizeLinear", [value, "s", "zero"], f"{value}_q", f"QuantizeLinear_{value}")
            add("DequantizeLinear", [f"{value}_q", "s", "zero"], f"{value}_dq", f"DequantizeLinear_{value}")
        return f"{value}_dq"

    def weight(name: str, *shape: int) -> str:
        array = rng.standard_normal(shape)
        if not quantised:
            weights[name] = (array * 0.1).astype(np.float32)
            return name
        weights[f"{name}_q"] = np.clip(array * 40, -127, 127).astype(np.int8)
        add("DequantizeLinear", [f"{name}_q", "s", "zero"], name, f"DequantizeLinear_{name}")
        return name

    conv_in, to_q, to_k, scores, weighted, to_out, conv_out = names
    add("Conv", ["sample", weight("w_in", 32, 4, 3, 3)], "h", conv_in, pads=[1] * 4)  # its input stays float
    add("Reshape", ["h", "to_rows"], "columns", "rows")
    add("Transpose", ["columns"], "rows", "rows/transposed", perm=[0, 2, 1])
    weights["scale"], weights["shift"] = np.ones(32, np.float32), np.zeros(32, np.float32)
    add("LayerNormalization", ["rows", "scale", "shift"], "normed", "norm")
    shared = activation("normed")
    add("MatMul", [shared, weight("w_q", 32, 32)], "q", to_q)
    add("MatMul", [shared, weight("w_k", 32, 32)], "k", to_k)
    add("Transpose", ["k"], "kt", "turn", perm=[0, 2, 1])
    add("Mul", ["q", "half"], "scaled", "half")  # OpenVINO merges it with the scale of to_q, whose name gets lost
    add("MatMul", ["scaled", "kt"], "qk", scores)
    add("Softmax", ["qk"], "p", "softmax", axis=-1)
    add("MatMul", ["p", "normed"], "o", weighted)
    add("MatMul", [activation("o"), weight("w_o", 32, 32)], "y", to_out)
    add("Add", ["y", "bias"], "biased", f"{to_out}/bias")
    add("Add", ["biased", "rows"], "sum", "residual")
    add("Transpose", ["sum"], "back", "back", perm=[0, 2, 1])
    add("Reshape", ["back", "to_image"], "image", "image")
    add("Conv", [activation("image"), weight("w_out", 4, 32, 1, 1)], "out_sample", conv_out)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {kind: write_graph(folder / f"{kind}.onnx", quantised=kind == "int8") for kind in ("float", "int8")}


@pytest.fixture(scope="module")
def measured(graphs: dict[str, Path]) -> ComparedCosts:
    found = compare_costs(targets.get("cpu"), graphs["float"], graphs["int8"], rounds=12)
    assert found is not None
    return found


def test_every_layer_has_a_cost_under_its_own_name(measured: ComparedCosts) -> None:
    for costs in (measured.float_costs, measured.int8_costs):
        assert tuple(costs.milliseconds) == LAYERS
        # The counters count microseconds, in which a CPU may do a whole layer of these.
        assert all(spent >= 0 for spent in costs.milliseconds.values()) and costs.milliseconds["conv_in"] > 0, costs
        assert 0 < costs.attributed_ms <= costs.total_ms * (1 + 1e-6)
        assert costs.measured and costs.source.startswith("openvino 20")
    assert measured.measured
    for name, both in measured.layers.items():
        assert both == (measured.float_costs.milliseconds[name], measured.int8_costs.milliseconds[name])


def test_nearly_all_time_belongs_to_layers(measured: ComparedCosts) -> None:
    for costs in (measured.float_costs, measured.int8_costs):
        assert costs.attributed_ms > 0.8 * costs.total_ms


def test_a_layer_that_does_more_costs_more(tmp_path: Path) -> None:
    """The seeded difference: the same graph, of which one convolution has thousands of times the work."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    small = helper.make_node("Conv", ["x", "w1"], ["h"], name="small")
    large = helper.make_node("Conv", ["h", "w2"], ["y"], name="large", pads=[3] * 4)
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 48, 48])
        for name, channels in (("x", 4), ("y", 64))
    ]
    values = {"w1": np.ones((64, 4, 1, 1), np.float32), "w2": np.ones((64, 64, 7, 7), np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph([small, large], "g", info[:1], info[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "two.onnx"))
    costs = targets.get("cpu").layer_costs(tmp_path / "two.onnx", precision="fp32", rounds=8)
    assert costs is not None
    assert costs.milliseconds["large"] > costs.milliseconds["small"]


@pytest.mark.parametrize("name", ["jetson-orin", "jetson-orin-nano", "jetson-thor", "rtx", "rtx-blackwell"])
def test_what_is_not_here_is_estimated_and_says_so(graphs: dict[str, Path], name: str) -> None:
    found = compare_costs(targets.get(name), graphs["float"], graphs["int8"])
    assert found is not None and not found.measured
    assert found.source.startswith("estimate from operations and bytes: ") and "not measured" in found.source
    assert all(spent > 0 for both in found.layers.values() for spent in both)
    assert targets.get(name).spec.sources["speed"]


def test_nothing_is_made_up_about_a_gpu_nobody_named(graphs: dict[str, Path]) -> None:
    assert compare_costs(targets.get("tensorrt"), graphs["float"], graphs["int8"]) is None


def test_an_intel_gpu_is_measured_or_unknown(graphs: dict[str, Path]) -> None:
    target = targets.get("intel-gpu")
    costs = target.layer_costs(graphs["float"], precision="fp16", rounds=4)
    assert (costs is not None) == target.device_here()


def test_an_estimate_follows_operations_and_bytes(graphs: dict[str, Path], tmp_path: Path) -> None:
    orin = targets.get("jetson-orin")
    costs = orin.layer_costs(graphs["float"], precision="fp16")
    assert costs is not None
    # to_q: [64, 32] · [32, 32] moves 64·32 twice and 32·32 once, of two bytes each, at 204.8 GB/s; the 65,536
    # multiply-adds are done before that.
    assert costs.milliseconds["to_q"] == pytest.approx(2 * (2 * 64 * 32 + 32 * 32) / 204.8e6)
    quantised = orin.layer_costs(graphs["int8"], precision="int8")
    assert quantised is not None
    # Operands of one byte, the result of two, and half of the quantiser it shares with to_k.
    traffic = 64 * 32 + 32 * 32 + 2 * 64 * 32 + 3 * 64 * 32 / 2
    assert quantised.milliseconds["to_q"] == pytest.approx(traffic / 204.8e6)
    # Where nothing is quantised, nothing changes.
    for name in ("scores", "weighted"):
        assert quantised.milliseconds[name] == costs.milliseconds[name]
    # The tiny layer's quantiser outweighs what its operands save.
    assert quantised.milliseconds["to_out"] > costs.milliseconds["to_out"]


def test_a_large_layer_is_estimated_to_gain_by_its_operations(tmp_path: Path) -> None:
    import onnx

    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[1,640,64,64] x) => (float[1,640,64,64] y) {
        %s [conv] y = Conv <pads = [1, 1, 1, 1]> (%s)
    }"""
    # As the parser has no node names in every version, they are set afterwards.
    plain = text.replace("[conv] ", "") % ("", "x, w")
    dequantise = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z)"
    coded = text.replace("[conv] ", "") % (dequantise, "d, v")
    costs = {}
    for precision, source, dtype in (("fp16", plain, np.float32), ("int8", coded, np.int8)):
        proto = onnx.parser.parse_model(source)
        proto.graph.node[-1].name = "conv"
        values = {"w": np.zeros((640, 640, 3, 3), dtype)}
        if precision == "int8":
            values |= {"s": np.array(1, np.float32), "z": np.array(0, np.int8)}
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
        onnx.save(proto, str(tmp_path / f"{precision}.onnx"))
        found = targets.get("jetson-orin").layer_costs(tmp_path / f"{precision}.onnx", precision=precision)  # type: ignore[arg-type]
        assert found is not None
        costs[precision] = found.milliseconds["conv"]
    operations = 2 * 640 * 64 * 64 * 640 * 9
    assert costs["fp16"] == pytest.approx(operations / 42.5e9)
    assert operations / 85e9 < costs["int8"] < 0.7 * costs["fp16"]


def test_what_cannot_be_timed_is_an_error(graphs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("cpu", "jetson-orin", "rtx", "intel-gpu"):
        target = targets.get(name)
        with pytest.raises(ModelError, match="does not exist"):
            target.layer_costs(tmp_path / "none.onnx", precision="int8")
        with pytest.raises(ConfigError, match="cannot be built in"):
            target.layer_costs(graphs["float"], precision="int3")  # type: ignore[arg-type]
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    with pytest.raises(ModelError, match="not an ONNX file"):
        targets.get("cpu").layer_costs(tmp_path / "bad.onnx", precision="int8")
    with pytest.raises(ConfigError, match="0 rounds"):
        targets.get("cpu").layer_costs(graphs["float"], precision="int8", rounds=0)


def test_graphs_of_different_layers_do_not_compare(graphs: dict[str, Path], tmp_path: Path) -> None:
    other = write_graph(tmp_path / "other.onnx", quantised=True, names=("first", *LAYERS[1:]))
    with pytest.raises(ModelError, match="'conv_in' is only in one"):
        compare_costs(targets.get("cpu"), graphs["float"], other)
    twice = write_graph(tmp_path / "twice.onnx", quantised=False, names=("conv_in", "to_q", "to_q", *LAYERS[3:]))
    with pytest.raises(ModelError, match="no name of its own"):
        targets.get("cpu").layer_costs(twice, precision="fp32")


@pytest.mark.parametrize("spent", [-0.001, math.nan, math.inf])
def test_costs_that_cannot_be_are_refused(spent: float) -> None:
    with pytest.raises(ValueError, match="the cost of a is"):
        LayerCosts({"a": spent}, 1.0, "", True)
    with pytest.raises(ValueError, match="layers cost"):
        LayerCosts({"a": 2.0}, 1.0, "", True)


def test_names_survive_what_compilers_do_to_them(graphs: dict[str, Path]) -> None:
    layers = read_layers(graphs["int8"])
    assert layers.names == LAYERS
    assert layers.of(["conv_in/WithoutBiases", "Multiply_17", "conv_in"]) == ("conv_in",)
    assert layers.of(["to_q/DequantizationMultiply"]) == ("to_q",)
    assert layers.of(["to_out/bias"]) == ("to_out",)
    assert layers.of(["scores", "softmax", "weighted"]) == ("scores", "weighted")
    assert layers.of(["residual", "rows/transposed", "normed"]) == ()


def test_kernels_are_charged_to_whom_they_serve() -> None:
    def kernel(name: str, *reads: int, layers: tuple[str, ...] = ()) -> Kernel:
        return Kernel(name, layers, reads)

    kernels = [
        kernel("input"),
        kernel("first", 0, layers=("first",)),
        kernel("reorder", 1),
        kernel("norm", 2),
        kernel("quantise", 3),
        kernel("q", 4, layers=("q",)),
        kernel("k", 4, layers=("k",)),
        kernel("attention", 5, 6, layers=("scores", "weighted")),
        kernel("convert", 7),
        kernel("residual", 8, 2),
        kernel("split", 9),
        kernel("gelu", 10),
        kernel("gate", 10, 11),
        kernel("last", 12, layers=("last",)),
        kernel("sum", 13, 9),
    ]
    charged = dict(zip((one.name for one in kernels), charge(kernels), strict=True))
    assert charged["input"] == ("first",)
    # The addition to the residual reads it too, but ends what belongs to a layer.
    assert charged["reorder"] == charged["norm"] == charged["quantise"] == ("q", "k")
    assert charged["attention"] == ("scores", "weighted")
    assert charged["convert"] == ("scores", "weighted")
    # Two branches of one value are no meeting.
    assert charged["residual"] == charged["split"] == charged["gelu"] == charged["gate"] == ("last",)
    assert charged["sum"] == ()


def test_slower_layers_are_told_from_noise() -> None:
    in_float = LayerCosts({"a": 1.0, "b": 0.010, "c": 1.0, "d": 0.5}, 3.0, "s", True)
    quantised = LayerCosts({"a": 1.3, "b": 0.013, "c": 1.05, "d": 0.1}, 3.0, "s", True)
    costs = ComparedCosts(in_float, quantised)
    assert costs.slower() == (("a",),)  # b by 3 µs, c by 5 %
    assert costs.slower(share=0.01) == (("a",), ("c",))
    assert costs.slower([("a", "d"), ("b", "c")]) == ()  # what is quantised together is judged together
    assert costs.slower([("a", "b")]) == (("a", "b"),)


def test_single_runs_are_read_from_rounded_averages() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(5, 40, size=(40, 30)).astype(float)
    true[7, 3] = true[20, 3] = 4000.0  # another process
    counts = np.arange(1, 41)[:, None]
    averages = np.floor(np.cumsum(true, axis=0) / counts)
    runs, errors = of_each_run(averages[9:], 40)
    assert (np.abs(runs - true[10:]) <= errors[:, None]).all()
    found = undisturbed(runs, errors)
    expected = true[10:].mean(axis=0)
    expected[3] = np.delete(true[10:, 3], 10).mean()
    assert np.abs(found - expected).max() < 2.5
    # Without leaving disturbed runs out the kernel would seem ten times as slow.
    assert runs.mean(axis=0)[3] > 5 * found[3]


@pytest.mark.slow
def test_an_npu_is_estimated_by_its_compiler(graphs: dict[str, Path]) -> None:
    target = targets.get("intel-npu")
    if not target.probe().ok:
        pytest.skip("no NPU compiler: make npu-compiler")
    found = compare_costs(target, graphs["float"], graphs["int8"])
    assert found is not None and not found.measured
    assert "cost model" in found.source
    assert all(spent > 0 for both in found.layers.values() for spent in both)
