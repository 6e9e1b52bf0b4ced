"""Activation ranges: what is measured is what was put in, and a scale too wide for a task is found."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from calibration.ranges import ActivationRange, graph_ranges, measure_cases, measure_ranges
from calibration.shared_scales import LIMIT_DB, bundle_ranges, conflicts, largest, shared_scales, to_json
from mtu_compile.bundle import Manifest, TaskProvenance
from mtu_compile.bundle.quantisation import QuantisationRecord
from mtu_compile.core.errors import CalibrationError, ConfigError

C, H = 8, 4


def write_graph(path: Path, *, external: bool = False) -> Path:
    """conv → tokens → query, key and value → attention: input ``x`` [1, 8, 4, 4], output ``y`` [1, 16, 8]."""
    rng = np.random.default_rng(0)
    values = {
        "w_in": rng.standard_normal((C, C, 1, 1)).astype("f4"),
        "tokens": np.array([1, C, H * H], np.int64),
        "w_q": rng.standard_normal((C, C)).astype("f4"),
        "w_k": 3 * rng.standard_normal((C, C)).astype("f4"),
        "w_v": rng.standard_normal((C, C)).astype("f4"),
        "tenth": np.float32(0.1),
        "as_is": np.array([1, H * H, C], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w_in"], ["c"], name="conv"),
        helper.make_node("Reshape", ["c", "tokens"], ["r"], name="to_tokens"),
        helper.make_node("Transpose", ["r"], ["t"], name="to_tokens_t", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "w_q"], ["q"], name="attn.q"),
        helper.make_node("MatMul", ["t", "w_k"], ["k"], name="attn.k"),
        helper.make_node("MatMul", ["t", "w_v"], ["v"], name="attn.v"),
        helper.make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], name="attn.qk"),
        helper.make_node("Mul", ["qk", "tenth"], ["scaled"], name="attn.scale"),
        helper.make_node("Softmax", ["scaled"], ["s"], name="softmax"),
        helper.make_node("Reshape", ["v", "as_is"], ["heads"], name="heads"),
        helper.make_node("MatMul", ["s", "heads"], ["y"], name="attn.av"),
    ]
    info = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, C, H, H]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, H * H, C]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "attention", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 64}
    onnx.save(model, str(path), **(options if external else {}))
    return path


def calls(count: int, scale: float = 1.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{"x": (scale * rng.standard_normal((1, C, H, H))).astype("f4")} for _ in range(count)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("ranges") / "float.onnx")


def test_what_goes_in_is_what_is_measured(graph: Path) -> None:
    fed = calls(5)
    told: list[int] = []
    measured = measure_ranges(graph, fed, progress=told.append)
    everything = np.abs(np.stack([call["x"] for call in fed])).ravel().astype(np.float64)
    assert measured["conv"].absmax == pytest.approx(everything.max(), rel=1e-4)
    assert measured["conv"].rms == pytest.approx(np.sqrt(np.mean(everything**2)), rel=1e-4)
    assert measured["conv"].p9999 == pytest.approx(np.quantile(everything, 0.9999), rel=1 / 64)
    # q, k and v read one tensor; of query and key the key, with the larger weights, decides.
    assert measured["attn.q"] == measured["attn.k"] == measured["attn.v"]
    assert measured["attn.qk"].absmax > 1.5 * measured["attn.q"].absmax
    assert "attn.av" not in measured  # stays float in INT8
    assert told == [1] * 5
    assert [path.name for path in graph.parent.iterdir()] == ["float.onnx"]


def test_an_outlier_moves_the_maximum_and_not_the_percentile(graph: Path) -> None:
    fed = [{"x": np.ones((1, C, H, H), np.float32)} for _ in range(200)]
    fed[17]["x"][0, 3, 2, 1] = -1000.0
    measured = measure_ranges(graph, fed)["conv"]
    assert measured.absmax == 1000.0 and measured.p9999 == pytest.approx(1.0, rel=1 / 64)


def test_the_range_of_int8_has_the_least_squared_error(graph: Path) -> None:
    """Of those tried on the values themselves, none is better; some of their tail is cut off."""
    fed = calls(400)
    values = np.stack([call["x"] for call in fed]).astype(np.float64)

    def error(reach: float) -> float:
        step = reach / 127
        return float(np.square(np.clip(np.round(values / step), -127, 127) * step - values).mean())

    measured = measure_ranges(graph, fed)["conv"]
    assert measured.int8 < 0.98 * measured.absmax
    least = min(error(reach) for reach in np.geomspace(measured.absmax / 4, measured.absmax, 60))
    assert error(measured.int8) <= 1.02 * least


def test_few_tensors_at_a_time_and_weights_elsewhere_give_the_same(graph: Path, tmp_path: Path) -> None:
    told: list[int] = []
    once = measure_ranges(graph, calls(3))
    assert measure_ranges(graph, calls(3), output_bytes=1, progress=told.append) == once and told == [1] * 3
    apart = write_graph(tmp_path / "float.onnx", external=True)
    assert measure_ranges(apart, calls(3)) == once
    assert {path.name for path in tmp_path.iterdir()} == {"float.onnx", "float.onnx.data"}


def test_ignored_layers_are_left_out_and_bad_inputs_refused(graph: Path) -> None:
    assert set(measure_ranges(graph, calls(1), ignored_scopes=("attn.*",))) == {"conv"}
    with pytest.raises(ConfigError, match="matches no node"):
        measure_ranges(graph, calls(1), ignored_scopes=("nothing",))
    with pytest.raises(CalibrationError, match="no inputs"):
        measure_ranges(graph, [])
    with pytest.raises(CalibrationError, match=r"float\.onnx does not take"):
        measure_ranges(graph, [{"x": np.zeros((1, C, H, H + 1), np.float32)}])
    assert [path.name for path in graph.parent.iterdir()] == ["float.onnx"]


def test_an_int8_graph_holds_what_was_measured(graph: Path, tmp_path: Path) -> None:
    """The quantiser's own idea of a range and ours agree, for the same layers; a float layer has none."""
    fed, floats = calls(8), ("attn.q",)
    settings = QuantSettings(smooth_quant_alpha=None, ignored_scopes=floats)
    quantize_onnx(graph, fed, tmp_path / "int8.onnx", settings=settings)
    held, measured = graph_ranges(tmp_path / "int8.onnx"), measure_ranges(graph, fed, ignored_scopes=floats)
    assert held.keys() == measured.keys() == {"conv", "attn.k", "attn.v", "attn.qk"}
    for layer, size in held.items():
        assert size == pytest.approx(measured[layer].absmax, rel=0.35), layer
    assert graph_ranges(graph) == {}


def test_a_task_that_loses_bits_to_a_shared_scale_is_found(graph: Path) -> None:
    """Twice the input is 6.02 dB in each linear layer; four times that, where both factors of a product grow."""
    measured = measure_cases(graph, {"small": calls(3), "large": calls(3, 2.0)})
    assert measured == {"small": measure_ranges(graph, calls(3)), "large": measure_ranges(graph, calls(3, 2.0))}
    layers = shared_scales(largest(measured))
    assert {one.layer for one in layers} == set(measured["small"])
    for one in layers:
        assert one.worst == ("small", pytest.approx(6.02, abs=0.02)) and one.loss_db["large"] == 0
    assert len(conflicts(largest(measured))) == 5 and conflicts(largest(measured), limit_db=6.1) == ()
    assert conflicts(largest({"small": measured["small"], "twin": measured["small"]})) == ()


def test_conflicts_come_worst_first_and_say_what_they_cost() -> None:
    ranges = {
        "t2i": {"a": 1.0, "b": 8.0, "own": 1.0, "dead": 0.0},
        "sr": {"a": 4.0, "b": 1.0, "dead": 3.0},
        "edit": {"a": 4.0, "b": 8.0, "dead": 1.6},
    }
    worst, second = conflicts(ranges)
    assert worst.layer == "b" and worst.worst == ("sr", pytest.approx(18.06, abs=0.01))
    assert second.layer == "a" and second.worst == ("t2i", pytest.approx(12.04, abs=0.01))
    assert str(worst) == "b: the range of t2i (8) costs sr (1) 18.1 dB"
    # A layer only one task has is nobody's conflict, and one that sees only zeros loses nothing.
    assert [one.layer for one in shared_scales(ranges)] == ["b", "a", "dead"]
    assert set(shared_scales(ranges)[-1].loss_db) == {"sr", "edit"} and shared_scales(ranges)[-1].worst[1] < LIMIT_DB


def test_a_bundle_tells_its_conflicts() -> None:
    def entry(ranges: dict[str, float] | None) -> Any:
        return SimpleNamespace(
            provenance=TaskProvenance(quantisation=None if ranges is None else QuantisationRecord(ranges=ranges))
        )

    tasks = {"t2i": entry({"a": 1.0}), "sr": entry({"a": 2.5}), "float": entry(None)}
    (found,) = conflicts(bundle_ranges(cast(Manifest, SimpleNamespace(tasks=tasks))))
    assert found.layer == "a" and set(found.ranges) == {"t2i", "sr"}
    assert conflicts(bundle_ranges(cast(Manifest, SimpleNamespace(tasks={"t2i": entry({"a": 1.0})})))) == ()


def test_the_record_is_plain_json() -> None:
    measured = {"t2i": {"a": ActivationRange(1.0, 0.9, 0.2, 0.8)}, "sr": {"a": ActivationRange(4.0, 3.0, 1.0, 3.5)}}
    record = to_json(measured)
    assert json.loads(json.dumps(record)) == record
    assert record["layers_compared"] == 1 and record["limit_db"] == LIMIT_DB
    assert record["conflicts"] == [
        {"layer": "a", "ranges": {"t2i": 1.0, "sr": 4.0}, "loss_db": {"t2i": 12.04, "sr": 0}}
    ]
    assert record["tasks"]["t2i"]["a"] == {"absmax": 1.0, "p9999": 0.9, "rms": 0.2, "int8": 0.8}
