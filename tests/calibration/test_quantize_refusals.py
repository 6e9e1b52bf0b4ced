"""What is no graph to quantise, no data to calibrate with, or no graph that every target takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from mtu_compile.core.errors import CalibrationError, ConfigError, ModelError, PassError
from mtu_compile.graph import qdq
from tests.calibration.small_graph import (
    C,
    H,
    make_samples,
    write_free_batch,
    write_graph,
)

pytestmark = pytest.mark.int8


@pytest.mark.parametrize("scope", ["attn.x", "attn", "Gemm", ".*nothing", "conv_in("])
def test_a_scope_that_matches_nothing_is_an_error(tmp_path, scope):
    source = write_graph(tmp_path / "float.onnx")
    with pytest.raises(ConfigError, match="ignored scope"):
        quantize_onnx(source, make_samples(1), tmp_path / "out.onnx", settings=QuantSettings(ignored_scopes=(scope,)))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("options", [{"subset_size": 0}, {"smooth_quant_alpha": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError):
        QuantSettings(**options)


X = np.zeros((1, 4, H, H), np.float32)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "empty"),
        ([{"sample": X}], "'sample': the graph has no such input|'x': the sample lacks it"),
        ([{"x": X, "task_ids": X}], "'task_ids': the graph has no such input"),
        ([{"x": X}, {"x": X[:, :3]}], r"sample 1: 'x' is float32\[1, 3, 4, 4\], not float32\[1, 4, 4, 4\]"),
        ([{"x": X.astype(np.float64)}], "float64"),
        ([{"x": X + np.nan}], "NaN"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path, samples, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        quantize_onnx(write_graph(tmp_path / "float.onnx"), samples, tmp_path / "out.onnx")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out.onnx").exists()


def test_graphs_that_cannot_be_quantised_are_refused(quantised, tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            quantize_onnx(path, make_samples(1), tmp_path / "out.onnx")

    refused(tmp_path / "none.onnx", "there is no ONNX file")
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    refused(tmp_path / "bad.onnx", "is not an ONNX file")
    refused(quantised.path, "quantised already")
    model = onnx.load(str(quantised.source))
    for axis, name in ((0, "samples"), (2, "batch")):  # of the batch, and of nothing else, the size may be open
        dynamic = onnx.ModelProto()
        dynamic.CopyFrom(model)
        dynamic.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
        onnx.save(dynamic, str(tmp_path / "dynamic.onnx"))
        refused(tmp_path / "dynamic.onnx", "'x' of dynamic.onnx has a dynamic shape")


def test_the_inputs_of_one_sample_have_one_batch(tmp_path):
    source = write_free_batch(tmp_path / "float.onnx")
    model = onnx.load(str(source))
    other = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 1, 1, 1])
    model.graph.input.append(other)
    model.graph.node.insert(0, helper.make_node("Add", ["x", "z"], ["x+z"], name="add"))
    model.graph.node[1].input[0] = "x+z"
    onnx.save(model, str(source))
    two, three = np.zeros((2, 4, H, H), np.float32), np.zeros((3, 1, 1, 1), np.float32)
    with pytest.raises(CalibrationError, match=r"'z' is float32\[3, 1, 1, 1\], not float32\[2, 1, 1, 1\]"):
        quantize_onnx(source, [{"x": two, "z": three}], tmp_path / "out.onnx")


def test_weights_outside_the_folder_are_refused(tmp_path):
    source = write_graph(tmp_path / "in" / "float.onnx", external=True)
    model = onnx.load(str(source), load_external_data=False)
    (source.parent / "float.onnx.data").rename(tmp_path / "float.onnx.data")
    with pytest.raises(ModelError, match=r"float\.onnx\.data is missing"):
        quantize_onnx(source, make_samples(1), tmp_path / "out.onnx")
    (source.parent / "sub").mkdir()
    (source.parent / "sub" / "weights").write_bytes((tmp_path / "float.onnx.data").read_bytes())
    (source.parent / "link").symlink_to("sub/weights")
    # The last two are inside, and still not what NNCF would read.
    for location, message in (
        ("../float.onnx.data", "outside the model's folder"),
        ("sub/weights", "right beside it"),
        ("link", "right beside it"),
    ):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        source.write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match=message):
            quantize_onnx(source, make_samples(1), tmp_path / "out.onnx")


def test_a_failure_of_nncf_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    import nncf

    def fail(*args: object, **kwargs: object) -> None:
        raise nncf.ValidationError("no such thing")

    monkeypatch.setattr(nncf, "quantize", fail)
    with pytest.raises(PassError, match=r"cannot quantise float\.onnx: no such thing"):
        quantize_onnx(write_graph(tmp_path / "float.onnx"), make_samples(1), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


class TestVerify:
    """Graphs that some target would refuse."""

    @staticmethod
    def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
        return next(tensor for tensor in model.graph.initializer if tensor.name == name)

    @staticmethod
    def quantiser(model: onnx.ModelProto, *, of_weight: bool) -> onnx.NodeProto:
        constants = {tensor.name for tensor in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        return next(node for node in nodes if (node.input[0] in constants) == of_weight)

    def test_a_zero_point_that_is_not_zero(self, quantised):
        model = onnx.load(str(quantised.path))
        zero = self.initializer(model, self.quantiser(model, of_weight=False).input[2])
        zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
        with pytest.raises(PassError, match="zero point that is not 0"):
            qdq.verify(ir.from_proto(model))

    def test_an_unsigned_activation(self, quantised):
        model = onnx.load(str(quantised.path))
        zero = self.initializer(model, self.quantiser(model, of_weight=False).input[2])
        zero.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), zero.name))
        with pytest.raises(PassError, match="is uint8, not int8"):
            qdq.verify(ir.from_proto(model))

    def test_an_int32_bias(self, quantised):
        model = onnx.load(str(quantised.path))
        conv = next(node for node in model.graph.node if node.name == "conv_in")
        for name, value in {
            "bias32": np.zeros(C, np.int32),
            "bias_scale": np.float32(1),
            "bias_zero": np.int32(0),
        }.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        inputs = ["bias32", "bias_scale", "bias_zero"]
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, ["bias_float"], name="bias_dq"))
        conv.input[2] = "bias_float"
        with pytest.raises(PassError, match="'bias_dq' is int32, not int8"):
            qdq.verify(ir.from_proto(model))

    def test_an_int8_bias(self, quantised):
        model = onnx.load(str(quantised.path))
        conv = next(node for node in model.graph.node if node.name == "conv_in")
        conv.input[2] = self.quantiser(model, of_weight=True).output[0]
        with pytest.raises(PassError, match="bias of 'conv_in' is quantised"):
            qdq.verify(ir.from_proto(model))

    def test_nothing_quantised(self, quantised):
        with pytest.raises(PassError, match="no weight was quantised"):
            qdq.verify(ir.from_proto(onnx.load(str(quantised.source))))
