"""A network for one, two and three samples in one; and what a compiled network keeps of its file in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from mtu_compile.core.errors import TargetError
from targets.openvino import engine as engine_module
from targets.openvino.batches import MOST, branches, of_batch
from targets.openvino.engine import OpenVINOEngine
from targets.openvino.float_engine import OpenVINOFloatEngine
from targets.openvino.mapped import give_back

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
RNG = np.random.default_rng(0)


def shared(width: int = 8, *, quantised: bool = True) -> openvino.Model:
    """out = sample · w · gates[task] + timestep; sample is [?, width]."""
    sample = ops.parameter(openvino.PartialShape([-1, width]), np.float32, name="sample")
    task = ops.parameter(openvino.PartialShape([-1]), np.int64, name="task")
    timestep = ops.parameter([1], np.float32, name="timestep")
    value = sample
    if quantised:
        low, high = (ops.constant(np.float32(end)) for end in (-4, 4))
        value = ops.fake_quantize(sample, low, high, low, high, 256)
    product = ops.matmul(value, ops.constant(RNG.standard_normal((width, width)).astype(np.float32)), False, True)
    gates = ops.gather(ops.constant(np.array([[1.0], [2.0], [3.0]], np.float32)), task, ops.constant(0))
    out = ops.add(ops.multiply(product, gates), timestep)
    for node, name in ((sample, "sample"), (task, "task"), (timestep, "timestep"), (out, "out")):
        node.output(0).set_names({name})
    return openvino.Model([out], [sample, task, timestep], "net")


def feeds(samples: int, width: int = 8) -> dict[str, Any]:
    return {
        "sample": RNG.standard_normal((samples, width)).astype(np.float32),
        "task": np.arange(samples) % 3,
        "timestep": np.array([0.5], np.float32),
    }


@pytest.mark.int8
def test_branches_compute_what_models_of_each_batch_compute() -> None:
    model, core = shared(), openvino.Core()
    whole = core.compile_model(branches(model), "CPU", F32)
    for samples in (2, 1, 3, 1):
        given = feeds(samples)
        expected = core.compile_model(of_batch(model, samples), "CPU", F32)(given)[0]
        np.testing.assert_allclose(whole(given)[0], expected, rtol=1e-5, atol=1e-5)


def test_branches_have_the_inputs_and_the_output_of_the_model() -> None:
    model = shared()
    whole = branches(model)
    assert [port.names for port in whole.inputs] == [port.names for port in model.inputs]
    assert whole.output(0).names == model.output(0).names == {"out"}
    assert [port.partial_shape for port in whole.inputs] == [port.partial_shape for port in model.inputs]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SMALL", 0)


@pytest.mark.parametrize(
    ("kind", "quantised", "most"),
    [(OpenVINOEngine, True, MOST), (OpenVINOEngine, False, None), (OpenVINOFloatEngine, True, None)],
)
def test_a_large_network_has_branches_if_it_multiplies_integers(
    tmp_path: Path, large: None, kind: type[OpenVINOEngine], quantised: bool, most: int | None
) -> None:
    openvino.save_model(shared(quantised=quantised), tmp_path / "net.xml", compress_to_fp16=False)
    engine = kind(tmp_path / "net.xml", F32)
    assert engine.inputs["sample"].most == most
    given = feeds(3)
    alone = [engine({**given, "sample": given["sample"][i : i + 1], "task": given["task"][i : i + 1]}) for i in (0, 1)]
    np.testing.assert_allclose(engine(given)["out"][:2], np.concatenate([one["out"] for one in alone]), rtol=1e-5)


def test_more_samples_than_branches_are_refused(tmp_path: Path, large: None) -> None:
    openvino.save_model(shared(), tmp_path / "net.xml", compress_to_fp16=False)
    with pytest.raises(TargetError, match="sample"):
        OpenVINOEngine(tmp_path / "net.xml", F32)(feeds(MOST + 1))


def mapped_bytes(file: Path) -> int:
    """Of ``file`` in this process's memory."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = line.endswith(str(file.resolve()))
        elif counts and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what of a file is in memory")
def test_weights_that_the_kernels_copied_are_not_in_memory_twice(tmp_path: Path) -> None:
    width = 1024  # 4 MB of weights
    openvino.save_model(shared(width, quantised=False), tmp_path / "net.xml", compress_to_fp16=False)
    model = openvino.Core().read_model(tmp_path / "net.xml")
    kept = openvino.Core().compile_model(of_batch(model, 2), "CPU", F32)
    before, given = mapped_bytes(tmp_path / "net.bin"), feeds(2, width)
    expected = kept(given)[0]
    assert before > 4 * width * width / 2, "OpenVINO does not map the file any more"
    assert give_back(tmp_path / "net.bin") >= 4 * width * width
    assert mapped_bytes(tmp_path / "net.bin") < before / 4
    np.testing.assert_array_equal(kept(given)[0], expected)
    engine = OpenVINOEngine(tmp_path / "net.xml", F32)
    np.testing.assert_allclose(engine(given)["out"], expected, rtol=1e-5)
    assert mapped_bytes(tmp_path / "net.bin") < before / 4
