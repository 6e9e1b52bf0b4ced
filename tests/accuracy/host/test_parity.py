"""One graph on several backends; every way in which they can disagree is seeded and has to be seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile.accuracy.host.parity import Backend, backends, parity
from mtu_compile.core.errors import AccuracyError, TargetError
from mtu_compile.runtime.engine import open_engine
from mtu_compile.runtime.reference import Reference, Trajectory

pytestmark = pytest.mark.int8

STEPS = (999.0, 666.0, 333.0, 1.0)


def write_graph(path: Path, *, kind: str = "fp32", scale: float = 1.0) -> Path:
    """conv(sample) + timestep / 1000 as float, float16 inside, or int8 Q/DQ around the convolution; I/O float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    inner = np.float16 if kind == "fp16" else np.float32
    weights = rng.standard_normal((4, 4, 3, 3)) * 0.2 * scale
    constants: dict[str, Any] = {"thousandth": np.array([0.001], inner)}
    nodes = []
    sample, timestep, out = "sample", "timestep", "out_sample"
    if kind == "fp16":
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_half"], to=TensorProto.FLOAT16)
            for name in ("sample", "timestep")
        ]
        sample, timestep, out = "sample_half", "timestep_half", "out_half"
    if kind == "int8":
        constants |= {
            "x_scale": np.array(0.035, np.float32),
            "w_scale": np.array(np.abs(weights).max() / 127, np.float32),
            "zero": np.array(0, np.int8),
        }
        constants["w_int"] = np.clip(np.round(weights / constants["w_scale"]), -127, 127).astype(np.int8)
        nodes += [
            helper.make_node("QuantizeLinear", ["sample", "x_scale", "zero"], ["x_int"]),
            helper.make_node("DequantizeLinear", ["x_int", "x_scale", "zero"], ["x"]),
            helper.make_node("DequantizeLinear", ["w_int", "w_scale", "zero"], ["w"]),
        ]
        sample = "x"
    else:
        constants["w"] = weights.astype(inner)
    nodes += [
        helper.make_node("Mul", [timestep, "thousandth"], ["t"]),
        helper.make_node("Conv", [sample, "w"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["conv", "t"], [out]),
    ]
    if kind == "fp16":
        nodes.append(helper.make_node("Cast", ["out_half"], ["out_sample"], to=TensorProto.FLOAT))
    shape = [2, 4, 8, 8]
    graph = helper.make_graph(
        nodes,
        "unet",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> Reference:
    """Two trajectories of four steps, as the float graph computes them."""
    import onnxruntime

    path = write_graph(tmp_path / "float.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    trajectories = []
    for seed in range(2):
        inputs = [
            {"sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32), "timestep": np.array([t], np.float32)}
            for t in STEPS
        ]
        outputs = np.stack([session.run(None, feed)[0] for feed in inputs])
        blank = np.zeros((1, 4, 8, 8), np.float32)
        picture = Image.new("RGB", (32, 32))
        trajectories.append(Trajectory("a cat", seed, None, None, inputs, outputs, blank, blank, picture))
    return Reference("t2i", len(STEPS), "the float graph", tuple(trajectories))


class Changed:
    """An engine whose outputs go through a function first."""

    def __init__(self, graph: Path, change: Callable[[np.ndarray], Any], name: str = "out_sample") -> None:
        self._engine = open_engine("onnxruntime", graph, {})
        self._change, self._name, self.closed = change, name, False
        self.inputs, self.outputs = self._engine.inputs, self._engine.outputs

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {self._name: self._change(self._engine(inputs)["out_sample"])}

    def close(self) -> None:
        self.closed = True


#: Least SQNR against the float original that each kind of graph has.
LEAST = {"fp32": 100.0, "fp16": 50.0, "int8": 25.0}


@pytest.mark.parametrize("kind", LEAST)
def test_onnx_runtime_and_openvino_agree(recorded, tmp_path, kind, capsys):
    table = parity(write_graph(tmp_path / "unet.onnx", kind=kind), recorded, guidance="text")
    assert [row.backend for row in table.rows] == ["ONNX Runtime CPU", "OpenVINO CPU, f32"]
    assert table.calls == 8 and table.reference == "the float graph" and not table.not_run
    for row in table.rows:
        assert row.worst_sqnr_db > LEAST[kind] and row.mean_sqnr_db >= row.worst_sqnr_db and row.worst_cosine > 0.998
        assert row.worst_guidance_ratio == pytest.approx(1, abs=0.05)
    assert table.rows[0].agreement_db is None
    assert table.failures == ()
    table.require()
    written = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert written["rows"][1]["agreement_db"] == table.rows[1].agreement_db
    assert capsys.readouterr().out == ""


def test_an_engine_of_lower_precision_is_shown_and_not_judged_by_agreement(recorded, tmp_path):
    graph = write_graph(tmp_path / "unet.onnx", kind="fp32")
    coarse = Changed(graph, lambda y: np.float32(1.01) * y)
    table = parity(graph, recorded, extra=[Backend("NPU, as built", "1.0", lambda: coarse, judged=False)])
    table.require()
    assert table.rows[-1].backend == "NPU, as built" and not table.rows[-1].judged
    assert table.rows[-1].agreement_db == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize(
    "defect",
    [lambda y: 1.5 * y, lambda y: y[::-1], lambda y: y + np.float32(0.3), lambda y: y * np.float32(0)],
    ids=["wrong scale", "swapped samples", "wrong bias", "zeros"],
)
def test_a_backend_that_computes_something_else_fails(recorded, tmp_path, kind, defect):
    graph = write_graph(tmp_path / "unet.onnx", kind=kind)
    broken = Changed(graph, defect)
    table = parity(graph, recorded, extra=[Backend("broken device", "1.0", lambda: broken)])
    (failure,) = table.failures
    assert failure.startswith("broken device differs from ONNX Runtime CPU on unet.onnx of task 't2i'")
    with pytest.raises(AccuracyError, match="broken device") as caught:
        table.require()
    assert caught.value.exit_code == 3 and caught.value.hint
    assert table.to_json()["failures"] == [failure]
    assert broken.closed


def test_a_defect_in_a_single_call_is_seen(recorded, tmp_path):
    graph = write_graph(tmp_path / "unet.onnx")
    calls = iter(range(100))
    once = Changed(graph, lambda y: 1.1 * y if next(calls) == 5 else y)
    table = parity(graph, recorded, extra=[Backend("device", "1.0", lambda: once)])
    assert table.rows[2].agreement_db == pytest.approx(20, abs=0.1)
    assert len(table.failures) == 1


def test_the_graph_itself_may_be_wrong_on_every_backend_alike(recorded, tmp_path):
    """Backends that agree on a wrong graph are in parity; the columns against the original say that it is wrong."""
    table = parity(write_graph(tmp_path / "unet.onnx", scale=1.5), recorded)
    assert table.failures == ()
    assert all(row.worst_sqnr_db < 10 for row in table.rows)


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda y: y, "renamed", "no output 'out_sample'"),
        (lambda y: y * np.float32(np.nan), "out_sample", "NaN"),
        (lambda y: y[:1], "out_sample", "has shape"),
    ],
)
def test_what_polygraphy_would_call_equal_is_refused(recorded, tmp_path, change, name, message):
    graph = write_graph(tmp_path / "unet.onnx")
    engine = Changed(graph, change, name)
    with pytest.raises(AccuracyError, match=message):
        parity(graph, recorded, extra=[Backend("device", "1.0", lambda: engine)])
    assert engine.closed


def test_nothing_recorded_is_no_agreement(recorded, tmp_path):
    graph = write_graph(tmp_path / "unet.onnx")
    with pytest.raises(AccuracyError, match="zero iterations"):
        parity(graph, Reference("t2i", 4, "", ()))
    with pytest.raises(AccuracyError, match="compare nothing"):
        parity(graph, recorded, calls=0)


def test_a_backend_that_cannot_open_the_graph_is_named(recorded, tmp_path):
    def refuse() -> Any:
        raise TargetError("no such device here")

    graph = write_graph(tmp_path / "unet.onnx")
    table = parity(graph, recorded, calls=3, extra=[Backend("device", "1.0", refuse)])
    assert table.not_run == {"device": "no such device here"}
    assert len(table.rows) == 2 and table.calls == 3 and table.failures == ()
    (tmp_path / "none.onnx").write_bytes(b"no graph")
    with pytest.raises(AccuracyError, match=r"no backend on this machine runs none\.onnx"):
        parity(tmp_path / "none.onnx", recorded)


def test_an_ir_is_run_by_openvino_alone(recorded, tmp_path):
    import openvino

    graph = write_graph(tmp_path / "unet.onnx")
    openvino.save_model(openvino.Core().read_model(str(graph)), str(tmp_path / "unet.xml"), compress_to_fp16=False)
    assert [backend.name for backend in backends(tmp_path / "unet.xml")] == ["OpenVINO CPU, f32"]
    (row,) = parity(tmp_path / "unet.xml", recorded).rows
    assert row.worst_sqnr_db > 100 and row.agreement_db is None


def test_vendors_offer_the_backends_and_the_one_that_leads_comes_first(tmp_path, monkeypatch):
    opened: list[str] = []

    def record(kind: str, graph: Path, config: Mapping[str, str]) -> Any:
        opened.append(kind)

    for module in ("targets.openvino.host", "targets.onnxruntime.backend"):
        monkeypatch.setattr(f"{module}.open_engine", record)
    for native in (None, "openvino", "onnxruntime"):
        for backend in backends(tmp_path / "unet.onnx", native=native):
            backend.open()
    assert opened == [
        *("onnxruntime", "openvino-float"),  # for another device: the numbers as they are
        *("onnxruntime", "openvino"),  # for this CPU by OpenVINO: its INT8 kernels have to agree
        *("onnxruntime", "openvino-float"),
    ]
