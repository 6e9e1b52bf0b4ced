"""Sessions that compute with weights where they lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mtu_compile.graph import io as graph_io

#: Opens and runs the graph in a process of its own; prints its memory without and with it, and the result's sum.
RUN = """
import json, re, sys
from pathlib import Path
import numpy as np, onnxruntime
from mtu_compile.graph.sessions import lean_options

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

x = np.ones((4, 512), np.float32)
before = own()
session = onnxruntime.InferenceSession(sys.argv[1], lean_options(in_files=True), providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": x})
print(json.dumps([own() - before, float(y.sum())]))
"""


def write_graph(path: Path, layers: int, width: int = 512) -> float:
    """``layers`` products of random matrices in a file of their own; what RUN's sum has to be."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([4, width]), type=ir.TensorType(ir.DataType.FLOAT))
    value, nodes, weights, result = x, [], [], np.ones((4, width), np.float32)
    for layer in range(layers):
        array = (rng.standard_normal((width, 4 * width)) / width).astype(np.float32)
        up = ir.Value(name=f"w{layer}", const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        down = ir.Value(name=f"v{layer}", const_value=ir.tensor(array.T.copy()), shape=ir.Shape(array.T.shape))
        for weight in (up, down):
            weight.type = ir.TensorType(ir.DataType.FLOAT)
            weights.append(weight)
            nodes.append(ir.node("MatMul", [value, weight], name=f"{weight.name}/MatMul"))
            value = nodes[-1].outputs[0]
            value.name = f"{weight.name}.out"
        result = result @ array @ array.T
    value.shape, value.type = ir.Shape([4, width]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="products")
    graph_io.save(ir.Model(graph, ir_version=9), path, external_bytes=1000)
    return float(result.sum())


def test_weights_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    expected = write_graph(path, layers=16)
    weights = path.with_name("model.onnx.data").stat().st_size
    assert weights > 100 << 20
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, check=True)
    own, total = json.loads(done.stdout)
    assert own < weights / 3
    assert np.isclose(total, expected, rtol=1e-3)
