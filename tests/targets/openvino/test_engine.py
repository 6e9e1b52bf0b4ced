"""What the OpenVINO engine does with blobs, with devices that are not there, and with inputs as files have them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from mtu_compile.core.errors import TargetError
from targets.openvino.engine import OpenVINOEngine, for_device

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def scaled(by: float, *, shape: tuple[int, ...] = (2, 3), name: str = "y") -> openvino.Model:
    """name = by · x."""
    x = ops.parameter(list(shape), np.float32, name="x")
    y = ops.multiply(x, ops.constant(np.float32(by)))
    x.output(0).set_names({"x"})
    y.output(0).set_names({name})
    return openvino.Model([y], [x], "net")


def save(model: openvino.Model, folder: Path) -> Path:
    path = folder / "net.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def export(model: openvino.Model, folder: Path) -> Path:
    blob = folder / "net.blob"
    blob.write_bytes(openvino.Core().compile_model(model, "CPU", F32).export_model().getbuffer())
    return blob


def test_a_blob_is_run_in_place_of_the_graph(tmp_path: Path) -> None:
    engine = OpenVINOEngine(save(scaled(2), tmp_path), F32, export(scaled(3), tmp_path))
    assert engine.warnings == ()
    np.testing.assert_array_equal(engine({"x": X})["y"], 3 * X)


@pytest.mark.parametrize("content", [b"", b"not a blob", None])
def test_a_blob_the_device_does_not_take_is_said_and_compiled_here(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    blob = tmp_path / "net.blob"
    if content is not None:
        blob.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        engine = OpenVINOEngine(save(scaled(2), tmp_path), F32, blob)
    np.testing.assert_array_equal(engine({"x": X})["y"], 2 * X)
    (warning,) = engine.warnings
    assert "CPU does not take" in warning and "net.blob" in warning and "compiled here" in warning
    assert warning in caplog.text


@pytest.mark.parametrize("other", [{"shape": (4, 3)}, {"name": "z"}])
def test_a_blob_of_another_network_is_not_run(tmp_path: Path, other: dict[str, Any]) -> None:
    engine = OpenVINOEngine(save(scaled(2), tmp_path), F32, export(scaled(3, **other), tmp_path))
    assert "is not of" in engine.warnings[0]
    np.testing.assert_array_equal(engine({"x": X})["y"], 2 * X)


@pytest.mark.parametrize("device", ["NPU", "GPU"])
def test_a_device_that_is_not_there_is_an_error_that_names_its_driver(tmp_path: Path, device: str) -> None:
    if device in openvino.Core().available_devices:
        pytest.skip(f"this machine has the {device}")
    blob = export(scaled(2), tmp_path)
    with pytest.raises(TargetError, match=f"no device '{device}'") as caught:
        OpenVINOEngine(save(scaled(2), tmp_path), {"device": device}, blob)
    assert "driver" in str(caught.value.hint)


class CoreWithNPU:
    """A core that says it has an NPU; what it is given is kept, and compiled for the CPU."""

    available_devices = ("CPU", "NPU")

    def __init__(self) -> None:
        self.real = openvino.Core()
        self.options: dict[str, str] = {}

    def read_model(self, path: str) -> openvino.Model:
        return self.real.read_model(path)

    def compile_model(self, model: openvino.Model, device: str, options: dict[str, str]) -> Any:
        self.options = {"device": device, **options}
        return self.real.compile_model(model, "CPU", F32)

    def get_property(self, device: str, name: str) -> Any:
        return self.real.get_property(device, name)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> CoreWithNPU:
    core = CoreWithNPU()
    monkeypatch.setattr(openvino, "Core", lambda: core)
    return core


def test_a_network_that_ended_up_on_another_device_is_not_run(tmp_path: Path, core: CoreWithNPU) -> None:
    path = save(scaled(2), tmp_path)
    with pytest.raises(TargetError, match=r"put .*net\.xml on CPU instead of NPU"):
        OpenVINOEngine(path, {"device": "NPU"})


def test_what_an_npu_compiles_is_kept_where_it_is_told(tmp_path: Path, core: CoreWithNPU) -> None:
    path = save(scaled(2), tmp_path)
    with pytest.raises(TargetError, match="instead of NPU"):
        OpenVINOEngine(path, {"device": "NPU"}, cache=tmp_path / "built" / "cache")
    assert core.options == {"device": "NPU", "CACHE_DIR": str(tmp_path / "built" / "cache")}
    OpenVINOEngine(path, {"device": "CPU"}, cache=tmp_path / "none")
    assert core.options == {"device": "CPU"} and not (tmp_path / "none").exists()


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, core: CoreWithNPU, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="instead of NPU"), caplog.at_level(logging.WARNING):
        OpenVINOEngine(save(scaled(2), tmp_path), {"device": "NPU"}, cache=tmp_path / "file" / "cache")
    assert "cannot be kept" in caplog.text and "CACHE_DIR" not in core.options


def with_timestep() -> openvino.Model:
    """out = ids + float(timestep); ids is [?, 3], timestep int64 in the file."""
    timestep = ops.parameter([1], np.int64, name="timestep")
    ids = ops.parameter(openvino.PartialShape([-1, 3]), np.float32, name="ids")
    out = ops.add(ids, ops.convert(timestep, "f32"))
    for node, name in ((timestep, "timestep"), (ids, "ids"), (out, "out")):
        node.output(0).set_names({name})
    return openvino.Model([out], [timestep, ids], "net")


def test_timesteps_keep_their_fractions(tmp_path: Path) -> None:
    engine = OpenVINOEngine(save(with_timestep(), tmp_path), F32)
    assert str(engine.inputs["timestep"]) == "float32 [1]" and str(engine.inputs["ids"]) == "float32 [?, 3]"
    out = engine({"timestep": np.array([3.25], np.float32), "ids": np.zeros((2, 3), np.float32)})["out"]
    np.testing.assert_array_equal(out, np.full((2, 3), 3.25))


@pytest.mark.parametrize(("device", "batch"), [("NPU", 1), ("NPU.4000", 1), ("CPU", -1), ("GPU", -1)])
def test_an_npu_is_given_fixed_shapes(device: str, batch: int) -> None:
    model = with_timestep()
    for_device(model, device)
    assert model.input("ids").partial_shape == openvino.PartialShape([batch, 3])
    assert model.output("out").partial_shape == openvino.PartialShape([batch, 3])


@pytest.mark.npu
def test_an_npu_runs_the_graph_and_keeps_what_it_compiled(tmp_path: Path) -> None:
    """Proves that a graph runs on an Intel NPU itself, that nothing else took its place, and that the cache is used."""
    for _ in range(2):
        engine = OpenVINOEngine(save(scaled(2), tmp_path), {"device": "NPU"}, cache=tmp_path / "cache")
        np.testing.assert_allclose(engine({"x": X})["y"], 2 * X, rtol=1e-3)
    assert any((tmp_path / "cache").iterdir())
