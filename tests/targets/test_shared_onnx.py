"""ONNX graphs side by side with one file of weights: the same numbers as before, and nothing outside their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mtu_compile.bundle import EngineRef
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import open_engine
from targets.shared_onnx import share_onnx_weights

X = np.random.default_rng(9).standard_normal((2, 40), dtype=np.float32)


def write(path: Path, own: int, *, external: bool) -> None:
    """y = (x · W) · V + b: W the same in all, V from the seed ``own``, b too small to leave the graph."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 40] x) => (float[2, 40] y) { h = MatMul(x, w)  k = MatMul(h, v)  y = Add(k, b) }"""
    model = onnx.parser.parse_model(text)
    for name, seed, shape in (("w", 0, (40, 40)), ("v", own, (40, 40)), ("b", 1, (40,))):
        weight = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))
    if external:
        graph_io.save(graph_io.load(path), path, external_bytes=0)


def run(path: Path) -> Any:
    return open_engine("onnxruntime", path, {})({"x": X})["y"]


# "model" is what the graphs are called before
TASKS = {"t2i": "unet", "model": "unet_model", "edit": "unet_edit"}


@pytest.fixture(params=[False, True], ids=["inside", "beside"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, EngineRef]:
    made = {}
    for seed, (task, folder) in enumerate(TASKS.items(), 2):
        write(tmp_path / folder / "model.onnx", seed, external=request.param)
        (tmp_path / folder / "model.engine").write_bytes(task.encode())
        made[task] = EngineRef("onnxruntime", f"{folder}/model.onnx", {}, f"{folder}/model.engine")
    return made


def test_shared_weights_compute_the_same_bit_for_bit(tmp_path: Path, engines: dict[str, EngineRef]) -> None:
    before = {task: run(tmp_path / ref.path) for task, ref in engines.items()}
    assert len({one.tobytes() for one in before.values()}) == 3
    shared = share_onnx_weights(tmp_path, engines)
    names = {f"{task}.{kind}" for task in TASKS for kind in ("onnx", "engine")} | {"weights.data"}
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")} == {"unet", *(f"unet/{n}" for n in names)}
    assert (tmp_path / "unet" / "weights.data").stat().st_size == 4 * 40 * 40 * 4
    for task, ref in shared.items():
        assert (ref.path, ref.weights, ref.weights_bytes) == (f"unet/{task}.onnx", "unet/weights.data", 2 * 40 * 40 * 4)
        assert ref.prebuilt is not None and (tmp_path / ref.prebuilt).read_bytes() == task.encode()
        assert run(tmp_path / ref.path).tobytes() == before[task].tobytes()
        onnx.checker.check_model(str(tmp_path / ref.path))
        assert graph_io.disk_bytes(tmp_path / ref.path) > 4 * 40 * 40 * 4


def test_without_enough_in_common_nothing_is_changed(tmp_path: Path, engines: dict[str, EngineRef]) -> None:
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert share_onnx_weights(tmp_path, engines, least_bytes=2 * 40 * 40 * 4 + 1) is engines
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before
