"""The graph on ONNX Runtime: same answer as numpy, exact about its inputs, clear about what it cannot read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.engine import open_engine


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    x = helper.make_tensor_value_info("sample", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [2, 4])
    node = helper.make_node("MatMul", ["sample", "w"], ["out_sample"])
    made = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_it_runs_the_graph(graph: Path) -> None:
    engine = open_engine("onnxruntime", graph, {})
    feed = np.ones((2, 3), np.float32)
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(engine({"sample": feed})["out_sample"], feed @ weight)
    assert engine.inputs["sample"].shape == (2, 3)
    assert list(engine.outputs) == ["out_sample"]


def test_it_takes_nothing_but_its_inputs(graph: Path) -> None:
    engine = open_engine("onnxruntime", graph, {})
    with pytest.raises(TargetError, match="sample"):
        engine({"sample": np.ones((2, 3), np.float64)})
    with pytest.raises(TargetError, match="no input 'other'"):
        engine({"sample": np.ones((2, 3), np.float32), "other": np.ones(1, np.float32)})
    engine.close()
    with pytest.raises(TargetError, match="closed"):
        engine({"sample": np.ones((2, 3), np.float32)})


def test_a_broken_graph_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(TargetError, match=r"model\.onnx"):
        open_engine("onnxruntime", path, {})
