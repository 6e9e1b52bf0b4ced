"""What is given to a target is never of a newer ONNX opset than its importer reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import passes
import targets
from calibration.compress import compress_onnx
from mtu_compile.core.errors import BuildError
from mtu_compile.graph import io as graph_io
from mtu_compile.stages.precision import COMPRESSED
from targets.opset import newer_than, require_opset


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Linear layers of a size that INT4 takes, at opset 20, as models are exported."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in ("w", "v", "u")}
    text = """(float[2,64] x) => (float[2,64] y) {
        a = MatMul(x, w) b = Gelu(a) c = MatMul(b, v) d = Elu(c) y = MatMul(d, u)
    }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\ng {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def lowered(graph: Path, tmp_path: Path) -> Any:
    """``lowered(target, precision)``: the graph as a target is given it, but that nothing is calibrated."""

    def lower(name: str, precision: Any) -> Path:
        spec, source, out = targets.get(name).spec, graph, tmp_path / f"{name}-{precision}.onnx"
        if precision in COMPRESSED:
            source = tmp_path / f"{precision}.onnx"
            if not source.exists():
                compress_onnx(graph, source, settings=COMPRESSED[precision])
        ids = spec.lowering.get(precision, ())
        if not ids:
            return source
        passes.run_pipeline(source, out, ids, passes.PassContext(original=graph))
        return out

    return lower


def test_no_precision_a_target_offers_needs_a_newer_opset_than_it_reads(lowered: Any) -> None:
    for name in targets.names():
        spec = targets.get(name).spec
        for precision in spec.precisions:
            require_opset(lowered(name, precision), spec)


@pytest.mark.parametrize(
    ("precision", "opset", "words"),
    [
        ("int4-weights", 20, r"opset 21, and .* 'jetson-orin' reads up to 20: node .* \(DequantizeLinear with U?INT4"),
        ("bf16", 21, r"opset 22, and .* 'rtx' reads up to 21: node 'Elu_3' \(Elu with BFLOAT16, new in opset 22\)"),
    ],
)
def test_a_graph_that_is_too_new_is_refused_by_what_needs_it(
    lowered: Any, precision: str, opset: int, words: str
) -> None:
    name = "jetson-orin" if precision == "int4-weights" else "rtx"
    with pytest.raises(BuildError, match=words) as caught:
        require_opset(lowered(name, precision), replace(targets.get(name).spec, opset=opset))
    assert caught.value.hint == "build in another precision"


def test_an_operator_is_named_where_it_is_new(graph: Path) -> None:
    assert list(newer_than(graph_io.load(graph), 19)) == ["node 'Gelu_1' (Gelu, new in opset 20)"]
    assert list(newer_than(graph_io.load(graph), 20)) == []


def test_a_graph_that_needs_nothing_of_its_opset_is_to_be_exported_at_another(graph: Path) -> None:
    model = onnx.load(graph)
    model.opset_import[0].version = 23
    onnx.save(model, graph)
    with pytest.raises(BuildError, match="nothing in it needs the newer one") as caught:
        require_opset(graph, targets.get("cpu").spec)
    assert caught.value.hint == "export the model at opset 21"


@pytest.mark.parametrize("name", ["cpu", "intel-gpu", "jetson-orin", "rtx-ada"])
def test_targets_refuse_it_before_they_build_and_leave_nothing(graph: Path, tmp_path: Path, name: str) -> None:
    model = onnx.load(graph)
    model.opset_import[0].version = 24
    onnx.save(model, graph)
    target = targets.get(name)
    with pytest.raises(BuildError, match=r"ONNX opset 24"):
        target.check_graph(graph, precision="fp32")
    with pytest.raises(BuildError, match=r"ONNX opset 24"):
        target.build(graph, tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()
