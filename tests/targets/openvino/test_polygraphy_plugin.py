"""The runner plugin, used as its users do: by the ``polygraphy`` command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def polygraphy(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("polygraphy")
    program = str(command) if command.exists() else shutil.which("polygraphy")
    assert program, "polygraphy is not installed beside this Python"
    return subprocess.run([program, "run", *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_onnxruntime_and_openvino_agree(unet_like):
    done = polygraphy(unet_like, "--onnxrt", "--openvino", "--atol", "1e-4", "--rtol", "1e-4")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "openvino-runner" in done.stdout and "Passed: 1/1 iterations" in done.stdout


def test_a_seeded_defect_is_found(unet_like, write_unet_like, tmp_path):
    other = write_unet_like(tmp_path / "other.onnx", scale=1.01)
    tolerances = ("--atol", "1e-4", "--rtol", "1e-4")
    done = polygraphy(unet_like, "--onnxrt", "--openvino", "--openvino-model", other, *tolerances)
    assert done.returncode != 0
    assert "Passed: 0/1 iterations" in done.stdout


def test_an_ir_is_a_model_too(unet_like, tmp_path):
    import openvino

    path = tmp_path / "ir" / "openvino_model.xml"
    openvino.save_model(openvino.Core().read_model(str(unet_like)), str(path), compress_to_fp16=False)
    saved = tmp_path / "outputs.json"
    assert polygraphy(unet_like, "--onnxrt", "--save-outputs", saved).returncode == 0
    arguments = ("--load-outputs", saved, "--atol", "1e-4", "--rtol", "1e-4")
    done = polygraphy(path, "--openvino", "--openvino-config", "INFERENCE_NUM_THREADS=1", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Passed: 1/1 iterations" in done.stdout


def test_the_options_reach_the_runner(unet_like):
    options = ("--openvino-precision", "bf16", "--openvino-device", "CPU", "--openvino-config", "NUM_STREAMS=1")
    script = polygraphy(unet_like, "--openvino", *options, "--gen-script", "-")
    assert script.returncode == 0, script.stderr
    assert "from targets.openvino.polygraphy_plugin import OpenVINORunner" in script.stdout
    assert "device='CPU', precision='bf16', config={'NUM_STREAMS': '1'}" in script.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--openvino-device", "TOASTER"), "cannot run the model on TOASTER: Device with"),
        (("--openvino-config", "oops"), "<name>=<value>"),
        (("--openvino-model", "nowhere.xml"), "nowhere.xml"),
    ],
)
def test_wrong_options_fail_with_a_reason(unet_like, options, message):
    done = polygraphy(unet_like, "--openvino", *options)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_the_runner_in_python(unet_like, feeds, run_reference):
    from targets.openvino.polygraphy_plugin import OpenVINORunner

    for model in (str(unet_like), unet_like.read_bytes(), lambda: str(unet_like)):
        with OpenVINORunner(model, name="candidate") as runner:
            metadata = runner.get_input_metadata(use_numpy_dtypes=False)
            assert {name: tuple(m.shape) for name, m in metadata.items()} == {
                "sample": (2, 4, 8, 8),
                "timestep": (1,),
            }
            first = runner.infer(feeds[0])["out_sample"]
            kept = first.copy()
            runner.infer(feeds[1])
            assert runner.last_inference_time() > 0
        assert np.array_equal(first, kept), "a later inference changed the outputs of an earlier one"
        assert np.allclose(first, run_reference(unet_like, feeds[0]), atol=1e-4)


def test_a_tensor_of_several_names_goes_by_the_one_a_person_gave(tmp_path):
    """As in the runtime, or outputs of one are not found in those of the other."""
    import openvino
    from openvino import opset13 as ops

    from mtu_compile.runtime.engine import open_engine
    from targets.openvino.polygraphy_plugin import OpenVINORunner

    x = ops.parameter([2], np.float32, name="x")
    y = ops.relu(x)
    x.output(0).set_names({"17", "x"})
    y.output(0).set_names({"33", "/Relu_output_0", "out_sample"})
    path = tmp_path / "net.xml"
    openvino.save_model(openvino.Model([y], [x], "net"), path)
    engine = open_engine("openvino", path, {})
    feed = {"x": np.array([-1, 1], np.float32)}
    with OpenVINORunner(str(path)) as runner:
        assert list(runner.get_input_metadata(use_numpy_dtypes=False)) == list(engine.inputs) == ["x"]
        assert list(runner.infer(feed)) == list(engine(feed)) == ["out_sample"]


def test_a_missing_openvino_is_named(unet_like, monkeypatch, capsys):
    from polygraphy.exception import PolygraphyException

    from targets.openvino.polygraphy_plugin import OpenVINORunner

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PolygraphyException, match="pip install"):
        OpenVINORunner(str(unet_like)).activate()


def test_float32_is_the_default_precision():
    from targets.openvino.polygraphy_plugin import OpenVINORunner

    assert OpenVINORunner("x.onnx")._config == {"INFERENCE_PRECISION_HINT": "f32"}
    own = OpenVINORunner("x.onnx", config={"INFERENCE_PRECISION_HINT": "bf16"})
    assert own._config == {"INFERENCE_PRECISION_HINT": "bf16"}


def test_the_guides_tolerances_fit_the_precision(unet_like, tmp_path):
    """docs/guide.md: rounding is no defect, and a threshold that allows for it still sees one."""
    import passes

    half = tmp_path / "fp16.onnx"
    passes.run_pipeline(unet_like, half, ("mtu::to-fp16",), passes.PassContext())
    both, snr = (half, "--onnxrt", "--openvino"), ("--compare", "snr", "--snr-threshold")
    assert polygraphy(*both).returncode != 0  # 1e-5 is for float32
    assert polygraphy(*both, *snr, 40).returncode == 0
    assert polygraphy(*both, *snr, 90).returncode != 0
    assert polygraphy(unet_like, *both[1:], *snr, 90).returncode == 0
