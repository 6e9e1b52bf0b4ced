"""One graph for four tasks, its batch free: quantised from all of them at once, and everything that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import targets
from calibration.compress import CompressSettings, compress_onnx
from calibration.dequantise import dequantise_onnx
from calibration.fp8 import to_fp8
from calibration.merged import MergedSet
from calibration.mixed import Criteria, Effort, TaskInputs, choose_for_all
from calibration.mixed.times import compare_costs_at
from calibration.quant_settings import QuantSettings
from calibration.quantize import QuantisationReport, quantize_onnx
from calibration.ranges import measure_ranges
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.bundle.quantisation import QuantisationRecord
from mtu_compile.core.schema import conform
from mtu_compile.graph import io as graph_io
from tests.calibration.test_merged import merge

pytestmark = pytest.mark.int8

C, H, TEXT, HIDDEN = 32, 4, 8, 64
SETTINGS = QuantSettings(smooth_quant_alpha=None, range_estimator="histogram", ignored_scopes=("conv_out",))


def write_graph(path: Path) -> Path:
    """Masked slots → conv → norm and affine of the task → attention to the text → gated feed-forward → conv.

    ``sample`` [batch, 9, 4, 4], ``task`` [batch], ``timestep`` [1], ``encoder_hidden_states`` [batch, 3, 8].
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        fan = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        return (rng.standard_normal(shape) / np.sqrt(fan)).astype("f4")

    mask = np.array([[c < channels for c in range(9)] for channels in (4, 8, 8, 9)], "f4").reshape(4, 9, 1, 1)
    values = {
        "mask": mask,
        "w_in": weights(C, 9, 3, 3),
        "tokens": np.array([0, C, H * H], np.int64),
        "ones": np.ones(C, "f4"),
        "gamma": rng.uniform(0.5, 2, (4, 1, C)).astype("f4"),
        "w_q": weights(C, C),
        "w_k": weights(TEXT, C),
        "w_v": weights(TEXT, C),
        "w_up": weights(C, HIDDEN),
        "gates": rng.uniform(0.1, 1, (4, 1, HIDDEN)).astype("f4"),
        "w_down": weights(HIDDEN, C),
        "b_down": weights(4, 1, C),
        "thousandth": np.float32(1e-3),
        "picture": np.array([0, C, H, H], np.int64),
        "w_out": weights(4, C, 1, 1),
    }

    def table(name: str) -> onnx.NodeProto:
        return helper.make_node("Gather", [name, "task"], [f"{name}.of"], name=f"{name}/Gather", axis=0)

    nodes = [
        *map(table, ("mask", "gamma", "gates", "b_down")),
        helper.make_node("Mul", ["sample", "mask.of"], ["slots"], name="slots"),
        helper.make_node("Conv", ["slots", "w_in"], ["c"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "tokens"], ["r"], name="to_tokens"),
        helper.make_node("Transpose", ["r"], ["t0"], name="to_tokens_t", perm=[0, 2, 1]),
        helper.make_node("Mul", ["timestep", "thousandth"], ["time"], name="time"),
        helper.make_node("Add", ["t0", "time"], ["t"], name="add_time"),
        helper.make_node("LayerNormalization", ["t", "ones"], ["n0"], name="norm"),
        helper.make_node("Mul", ["n0", "gamma.of"], ["n"], name="affine"),
        helper.make_node("MatMul", ["n", "w_q"], ["q"], name="attn.q"),
        helper.make_node("MatMul", ["encoder_hidden_states", "w_k"], ["k"], name="attn.k"),
        helper.make_node("MatMul", ["encoder_hidden_states", "w_v"], ["v"], name="attn.v"),
        helper.make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], name="attn.qk"),
        helper.make_node("Softmax", ["qk"], ["s"], name="softmax"),
        helper.make_node("MatMul", ["s", "v"], ["a"], name="attn.av"),
        helper.make_node("Add", ["a", "t"], ["res"], name="residual"),
        helper.make_node("MatMul", ["res", "w_up"], ["u"], name="ff.up"),
        helper.make_node("Tanh", ["u"], ["h0"], name="ff.act"),
        helper.make_node("Mul", ["h0", "gates.of"], ["h"], name="ff.gate"),
        helper.make_node("MatMul", ["h", "w_down"], ["d0"], name="ff.down"),
        helper.make_node("Add", ["d0", "b_down.of"], ["d"], name="ff.bias"),
        helper.make_node("Transpose", ["d"], ["dt"], name="to_picture_t", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["dt", "picture"], ["p"], name="to_picture"),
        helper.make_node("Conv", ["p", "w_out"], ["out_sample"], name="conv_out"),
    ]
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 9, H, H]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ["batch", 3, TEXT]),
        helper.make_tensor_value_info("task", TensorProto.INT64, ["batch"]),
    ]
    out = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", 4, H, H])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "shared", inputs, [out], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def run(path: Path, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, dict(feed))[0]


@dataclass(frozen=True)
class Quantised:
    graph: Path
    int8: Path
    calibration: MergedSet
    report: QuantisationReport

    def one_of_each(self) -> list[Any]:
        """A call of each task: of 2, 3, 1 and 3 samples."""
        return [self.calibration.of_task(task)[0] for task in self.calibration.sets]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder = tmp_path_factory.mktemp("shared")
    graph, calibration = write_graph(folder / "float.onnx"), merge(4, 4, 4, 4)
    report = quantize_onnx(graph, calibration, folder / "int8.onnx", settings=SETTINGS)
    return Quantised(graph, folder / "int8.onnx", calibration, report)


def test_the_graph_is_quantised_from_all_tasks_and_stays_free(quantised: Quantised) -> None:
    report = quantised.report
    assert report.samples == 16 and report.samples_by_task == dict.fromkeys(("t2i", "edit", "sr", "inpaint"), 4)
    assert report.layers == {"Conv": (1, 2), "MatMul": (7, 7)}
    assert conform(QuantisationRecord, report.to_json()).samples_by_task == report.samples_by_task
    graph = graph_io.load(quantised.int8).graph
    for name in ("mask", "gamma", "gates", "b_down"):  # not taken for embeddings: 4 rows, and whole activations
        assert graph.initializers[name].dtype == ir.DataType.FLOAT and graph.initializers[name].uses()
    shape = graph.inputs[0].shape
    assert shape is not None and not isinstance(shape[0], int)
    for call in quantised.one_of_each():
        expected = run(quantised.graph, call)
        assert expected.shape[0] == len(call["task"]) and sqnr_db(expected, run(quantised.int8, call)) > 20


def test_a_part_of_the_set_is_of_every_task(quantised: Quantised, tmp_path: Path) -> None:
    settings = replace(SETTINGS, subset_size=4)
    report = quantize_onnx(quantised.graph, quantised.calibration, tmp_path / "int8.onnx", settings=settings)
    assert report.samples_by_task == dict.fromkeys(("t2i", "edit", "sr", "inpaint"), 1)


def test_ranges_over_all_calls_are_those_of_the_widest_task(quantised: Quantised) -> None:
    merged = quantised.calibration
    together = measure_ranges(quantised.graph, merged.inputs, output_bytes=4096)  # several runs a call
    each = {task: measure_ranges(quantised.graph, merged.of_task(task)) for task in merged.sets}
    assert set(together) == {"conv_in", "attn.q", "attn.k", "attn.v", "attn.qk", "ff.up", "ff.down", "conv_out"}
    for layer, found in together.items():
        assert found.absmax == max(one[layer].absmax for one in each.values())
    assert len({one["ff.down"].absmax for one in each.values()}) == 4


@pytest.mark.parametrize("parallel", [False, True])
def test_layers_are_switched_in_calls_of_any_batch(quantised: Quantised, parallel: bool) -> None:
    with SwitchedGraph(quantised.graph, quantised.int8, parallel=parallel) as graph:
        names = [group.name for group in graph.groups]
        for call in quantised.one_of_each():
            np.testing.assert_allclose(graph.run(call), run(quantised.graph, call), atol=1e-6)
            np.testing.assert_allclose(graph.run(call, names), run(quantised.int8, call), atol=1e-6)
            for name, alone in zip(names, graph.run_each(call, range(len(names))), strict=True):
                np.testing.assert_array_equal(alone, graph.run(call, (name,)))


def test_the_chosen_layers_are_float_for_all_tasks(quantised: Quantised, tmp_path: Path) -> None:
    """What was measured in each task is what the graph then does in each."""
    tasks = TaskInputs.of_each(quantised.calibration)
    assert [one.guidance for one in tasks.values()] == ["text", "text+image", "none", "text+image"]
    with SwitchedGraph(quantised.graph, quantised.int8) as graph:
        effort = Effort(calls=2, check_calls=4)
        plain = choose_for_all(graph, tasks, effort=effort, criteria=Criteria(sqnr_db=0, guidance_ratio=0.1))
        worst = min(one.all_int8.worst_sqnr_db for one in plain.values())
        criteria = Criteria(sqnr_db=worst + 2, guidance_ratio=0.1, slowdown=0.9)
        found = choose_for_all(graph, tasks, effort=effort, criteria=criteria)
    (layers,) = {one.float_layers for one in found.values()}
    assert 0 < len(layers) < 8 and all(one.met for one in found.values())
    assert not any(one.float_layers for one in plain.values())
    int8 = tmp_path / "int8.onnx"
    int8.write_bytes(quantised.int8.read_bytes())
    report = dequantise_onnx(int8, quantised.graph, layers, quantised.report)
    assert report.samples_by_task == quantised.report.samples_by_task and set(layers) <= set(report.float_layers)
    for task, record in found.items():
        calls = quantised.calibration.of_task(task)
        worst = min(sqnr_db(run(quantised.graph, call), run(int8, call)) for call in calls)
        assert worst == pytest.approx(record.chosen.worst_sqnr_db, abs=0.01)
        assert record.calls == 2 and record.check_calls == 4


def test_weights_alone_and_fp8_leave_the_batch_free(quantised: Quantised, tmp_path: Path) -> None:
    made = {mode: tmp_path / f"{mode}.onnx" for mode in ("int8", "int4", "fp8")}
    assert compress_onnx(quantised.graph, made["int8"], settings=CompressSettings("int8")).layers["Conv"]["int8"] == 2
    settings = CompressSettings("int4", group_size=32)
    assert compress_onnx(quantised.graph, made["int4"], settings=settings).layers["MatMul"]["int4"] >= 1
    assert to_fp8(quantised.int8, quantised.graph, made["fp8"]).layers["MatMul"] == (7, 7)
    for mode, least in (("int8", 30), ("int4", 10), ("fp8", 15)):
        for call in quantised.one_of_each():
            assert sqnr_db(run(quantised.graph, call), run(made[mode], call)) > least, mode


def test_layers_are_priced_at_the_batch_that_is_asked_for(quantised: Quantised) -> None:
    """An estimate by operations and bytes: three samples are at least as dear as one, and nothing is left behind."""
    target, before = targets.get("rtx-ada"), sorted(quantised.int8.parent.iterdir())
    assert quantised.calibration.batch == 3
    costs = [compare_costs_at(target, quantised.graph, quantised.int8, batch=batch) for batch in (1, 3)]
    assert sorted(quantised.int8.parent.iterdir()) == before
    assert costs[0] is not None and costs[1] is not None and not costs[1].measured
    assert costs[0].int8_costs.total_ms < costs[1].int8_costs.total_ms
    assert set(costs[0].layers) == {
        node.name for node in onnx.load(quantised.graph).graph.node if node.op_type in ("Conv", "MatMul")
    }
