"""Quantises a small transformer-like graph for real, once, and looks at the result from all sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nncf.onnx.graph.model_transformer import ONNXModelTransformer
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

import passes
import targets
from calibration.nncf_weights import quantize_linear
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx, resolve_scopes
from calibration.ranges import graph_ranges
from mtu_compile.core.errors import CalibrationError, ConfigError, ModelError, PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

pytestmark = pytest.mark.int8

C, H = 16, 4  # width and side; C·H·H elements a sample


def write_graph(path: Path, *, external: bool = False) -> Path:
    """conv → norm → self-attention → feed-forward with Relu → conv: the parts of a UNet block.

    Input ``x`` f32 [1, 4, 4, 4], output ``y`` of the same shape.
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:] if len(shape) == 4 else shape[:1]))).astype("f4")

    values = {
        "w_in": weights(C, 4, 3, 3),
        "b_in": weights(C),
        "tokens": np.array([1, C, H * H], np.int64),
        "gamma": np.ones(C, np.float32),
        "beta": np.zeros(C, np.float32),
        "w_q": weights(C, C),
        "w_k": weights(C, C),
        "w_v": weights(C, C),
        "w_up": weights(C, 4 * C),
        "b_up": weights(4 * C),
        "w_down": weights(4 * C, C),
        "picture": np.array([1, C, H, H], np.int64),
        "w_out": weights(4, C, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w_in", "b_in"], ["c"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "tokens"], ["r"], name="to_tokens"),
        helper.make_node("Transpose", ["r"], ["t"], name="to_tokens_t", perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["t", "gamma", "beta"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "w_q"], ["q"], name="attn.q"),
        helper.make_node("MatMul", ["n", "w_k"], ["k"], name="attn.k"),
        helper.make_node("MatMul", ["n", "w_v"], ["v0"], name="attn.v"),
        helper.make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], name="attn.qk"),
        helper.make_node("Softmax", ["qk"], ["s"], name="softmax"),
        helper.make_node("Reshape", ["v0", "as_is"], ["v"], name="heads"),
        helper.make_node("MatMul", ["s", "v"], ["a"], name="attn.av"),
        helper.make_node("Add", ["a", "t"], ["res"], name="residual"),
        helper.make_node("MatMul", ["res", "w_up"], ["u0"], name="ff.up"),
        helper.make_node("Add", ["u0", "b_up"], ["u"], name="ff.bias"),
        helper.make_node("Relu", ["u"], ["act"], name="ff.act"),
        helper.make_node("MatMul", ["act", "w_down"], ["d"], name="ff.down"),
        helper.make_node("Transpose", ["d"], ["dt"], name="to_picture_t", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["dt", "picture"], ["p"], name="to_picture"),
        helper.make_node("Conv", ["p", "w_out"], ["y"], name="conv_out"),
    ]
    values["as_is"] = np.array([1, H * H, C], np.int64)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, H, H]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "block", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 256}
    onnx.save(model, str(path), **(options if external else {}))
    return path


def make_samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 4, H, H), dtype=np.float32)} for _ in range(count)]


def run_ort(path: Path, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    return np.stack([session.run(None, sample)[0] for sample in samples])


def run_openvino(path: Path, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.stack([compiled(sample)[0] for sample in samples])


def decibels(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(reference**2) / np.sum((reference - candidate) ** 2)))


@dataclass(frozen=True)
class Quantised:
    source: Path
    path: Path
    report: Any
    progress: list[tuple[int, int]]
    printed: str


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("quantised")
    source = write_graph(folder / "float.onnx")
    progress: list[tuple[int, int]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        report = quantize_onnx(
            source, make_samples(16), folder / "int8.onnx", progress=lambda *done: progress.append(done)
        )
    return Quantised(source, folder / "int8.onnx", report, progress, printed.getvalue())


def test_the_result_is_close_in_onnx_runtime_and_in_openvino(quantised, tmp_path):
    samples = make_samples(8, seed=9)
    reference = run_ort(quantised.source, samples)
    assert decibels(reference, run_ort(quantised.path, samples)) > 20
    lowered = tmp_path / "lowered.onnx"  # as this CPU multiplies
    context = passes.PassContext(original=quantised.source)
    passes.run_pipeline(quantised.path, lowered, targets.get("cpu").spec.lowering["int8"], context)
    assert decibels(reference, run_openvino(lowered, samples)) > 20


def test_the_report_counts_what_is_in_the_graph(quantised):
    report = quantised.report
    operations = Counter(node.op_type for node in onnx.load(str(quantised.path)).graph.node)
    # attention·value stays float: NNCF's transformer pattern, see the module's docstring.
    assert report.float_layers == ("attn.av",)
    assert report.layers == {"Conv": (2, 2), "MatMul": (6, 7)}
    assert report.weights == 7
    assert report.activations == operations["QuantizeLinear"]
    assert report.pairs == operations["DequantizeLinear"]
    assert report.samples == 16
    assert report.bytes_before == quantised.source.stat().st_size
    assert report.bytes_after == quantised.path.stat().st_size
    assert report.tool.startswith("nncf ")
    assert report.to_json()["layers"]["MatMul"] == [6, 7]


def test_every_target_can_take_the_graph(quantised):
    model = onnx.load(str(quantised.path))
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any()
    stored = {name: constants[name].dtype for name in constants if constants[name].ndim == 4}
    assert set(map(str, stored.values())) == {"int8"}


def test_progress_is_told_and_nothing_is_printed(quantised):
    assert quantised.progress[-1] == (32, 32)  # SmoothQuant looks at the samples once more
    assert quantised.progress == sorted(quantised.progress)
    assert quantised.printed == ""


def test_no_session_of_nncf_holds_on_to_its_memory(tmp_path, monkeypatch):
    import nncf.onnx.engine
    import onnxruntime

    opened = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **more: opened.append(args[1]) or session(*args, **more)
    )
    quantize_onnx(write_graph(tmp_path / "float.onnx"), make_samples(2), tmp_path / "out.onnx")
    assert opened and not any(options.enable_cpu_mem_arena for options in opened)
    assert nncf.onnx.engine.rt is onnxruntime


def test_weights_stay_in_their_file_until_the_graph_is_written(tmp_path, monkeypatch):
    """NNCF never has them in its protobuf or among a session's outputs, and sees each of them once."""
    import nncf.onnx.graph.onnx_helper as helpers
    import onnxruntime

    source = write_graph(tmp_path / "float.onnx", external=True)
    weights = {"w_q", "w_k", "w_v", "w_up", "w_down", "w_in", "w_out"}
    opened, read = [], []
    session, value = onnxruntime.InferenceSession, helpers.get_tensor_value
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **more: opened.append(session(*args, **more)) or opened[-1]
    )
    monkeypatch.setattr(helpers, "get_tensor_value", lambda model, name: read.append(name) or value(model, name))
    quantize_onnx(source, make_samples(3), tmp_path / "out.onnx", settings=QuantSettings(smooth_quant_alpha=None))
    assert not weights & {output.name for one in opened for output in one.get_outputs()}
    assert sorted(read) == sorted(set(read)) and weights - {"w_in"} <= set(read)


def test_integers_are_those_of_the_operator():
    from onnx.reference.ops.op_quantize_linear import QuantizeLinear_19

    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 5, 3, 3)).astype(np.float32)
    for axis, shape in ((0, (6,)), (1, (5,)), (-1, (3,)), (0, ())):
        scale = rng.uniform(0.001, 0.02, shape).astype(np.float32)  # some are cut off
        zero = np.zeros(shape, np.int8)
        expected = QuantizeLinear_19.eval(values, scale, zero, axis=axis)
        found = quantize_linear(values, scale, zero, axis)
        assert found.dtype == np.int8 and np.array_equal(found, expected)
    halves = np.array([0.5, 1.5, 2.5, -0.5, -200.0], np.float32)
    assert list(quantize_linear(halves, np.float32(1), np.int8(0), 0)) == [0, 2, 2, 0, -128]


def test_external_data_gives_the_same_graph(quantised, tmp_path):
    source = write_graph(tmp_path / "in" / "float.onnx", external=True)
    assert (source.parent / "float.onnx.data").is_file()
    report = quantize_onnx(source, make_samples(16), tmp_path / "out" / "int8.onnx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int8.onnx"]
    assert report.layers == quantised.report.layers
    assert report.bytes_before > source.stat().st_size + 4096
    samples = make_samples(2, seed=9)
    assert np.allclose(run_ort(quantised.path, samples), run_ort(tmp_path / "out" / "int8.onnx", samples), atol=1e-5)


def test_weights_that_nncf_looks_at_stay_in_their_file(tmp_path, monkeypatch):
    # A graph that has taken them all in is more than a protobuf may have, at Stable Diffusion 1.5's size.
    source, seen = write_graph(tmp_path / "in" / "float.onnx", external=True), []
    transform = ONNXModelTransformer.__init__

    def watched(self, model, *args, **kwargs):
        seen.append([tensor for tensor in model.graph.initializer if uses_external_data(tensor)])
        assert not any(tensor.raw_data for tensor in seen[-1])
        transform(self, model, *args, **kwargs)

    monkeypatch.setattr(ONNXModelTransformer, "__init__", watched)
    report = quantize_onnx(source, make_samples(2), tmp_path / "int8.onnx")
    assert report.weights > 1 and any(seen)


def test_large_results_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_io, "save", partial(graph_io.save, external_bytes=1000))
    out = tmp_path / "out" / "int8.onnx"
    settings = QuantSettings(smooth_quant_alpha=None)
    report = quantize_onnx(write_graph(tmp_path / "float.onnx"), make_samples(2), out, settings=settings)
    files = {path.name: path.stat() for path in out.parent.iterdir()}
    assert set(files) == {"int8.onnx", "int8.onnx.data"}
    assert len({stat.st_mode for stat in files.values()}) == 1
    assert report.bytes_after == sum(stat.st_size for stat in files.values())
    assert run_ort(out, make_samples(1)).shape == (1, 1, 4, H, H)


def test_ignored_scopes_stay_float_and_settings_are_kept(tmp_path):
    settings = QuantSettings(
        subset_size=3,
        smooth_quant_alpha=None,
        fast_bias_correction=False,
        ignored_scopes=("conv_in", r"attn\.[qkv]", "Relu"),
    )
    seen: list[tuple[int, int]] = []
    report = quantize_onnx(
        write_graph(tmp_path / "float.onnx"),
        make_samples(7),
        tmp_path / "int8.onnx",
        settings=settings,
        progress=lambda *done: seen.append(done),
    )
    assert {"conv_in", "attn.q", "attn.k", "attn.v"} <= set(report.float_layers)
    assert report.layers["Conv"] == (1, 2)
    assert report.samples == 3 and seen[-1] == (3, 3)
    assert report.settings == settings
    assert report.to_json()["settings"]["ignored_scopes"] == ["conv_in", r"attn\.[qkv]", "Relu"]


def test_a_calibration_set_object_is_taken_too(tmp_path):
    @dataclass(frozen=True)
    class Set:
        inputs: list[dict[str, np.ndarray]]

    settings = QuantSettings(smooth_quant_alpha=None)
    source = write_graph(tmp_path / "float.onnx")
    assert quantize_onnx(source, Set(make_samples(2)), tmp_path / "int8.onnx", settings=settings).samples == 2


@pytest.mark.parametrize("scope", ["attn.x", "attn", "Gemm", ".*nothing", "conv_in("])
def test_a_scope_that_matches_nothing_is_an_error(tmp_path, scope):
    source = write_graph(tmp_path / "float.onnx")
    with pytest.raises(ConfigError, match="ignored scope"):
        quantize_onnx(source, make_samples(1), tmp_path / "out.onnx", settings=QuantSettings(ignored_scopes=(scope,)))
    assert not (tmp_path / "out.onnx").exists()


def test_scopes_are_names_then_types_then_patterns(tmp_path):
    model = onnx.load(str(write_graph(tmp_path / "float.onnx")))
    assert resolve_scopes(model, ["ff.up", "Conv", r"attn\.[qk]"]) == (
        "ff.up",
        "conv_in",
        "conv_out",
        "attn.q",
        "attn.k",
    )


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


def write_free_batch(path: Path) -> Path:
    """The graph of ``write_graph`` for any number of samples."""
    model = onnx.load(str(write_graph(path)))
    for tensor in model.graph.initializer:
        if tensor.name in ("tokens", "picture", "as_is"):
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, *numpy_helper.to_array(tensor)[1:]]), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("estimator", ["histogram", "mean-minmax"])
def test_samples_of_different_batches_give_the_scales_that_single_ones_give(tmp_path, estimator):
    """The guidance of a task decides how many samples a call has: 2, 3, 3 and 1."""
    singles = make_samples(18)
    sizes = iter([2, 3, 3, 1] * 2)
    rest = [sample["x"] for sample in singles]
    batches = []
    while rest:
        size = next(sizes)
        batches.append({"x": np.concatenate(rest[:size])})
        rest = rest[size:]
    settings = QuantSettings(smooth_quant_alpha=None, range_estimator=estimator)
    source = write_free_batch(tmp_path / "float.onnx")
    ranges = []
    for name, samples in (("batches", batches), ("singles", singles)):
        out = tmp_path / f"{name}.onnx"
        assert quantize_onnx(source, samples, out, settings=settings).samples == len(samples)
        ranges.append(graph_ranges(out))
    assert ranges[0].keys() == ranges[1].keys() and len(ranges[0]) == 8
    # A batch's extremes are those of its samples, so their mean is larger: the histogram is indifferent.
    low, high = (0.97, 1.03) if estimator == "histogram" else (1.0, 1.35)
    assert all(low <= ranges[0][name] / ranges[1][name] <= high for name in ranges[0]), ranges
    for count in (1, 2, 5):
        feed = {"x": np.concatenate([sample["x"] for sample in make_samples(count, seed=7)])}
        assert decibels(run_ort(source, [feed]), run_ort(tmp_path / "batches.onnx", [feed])) > 17


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


def unsigned_graph(zero: int = 0) -> onnx.ModelProto:
    """x [4] → uint8 Q/DQ → y, scale 0.01."""
    values = {"s": np.array(0.01, np.float32), "z": np.array(zero, np.uint8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    kept = [helper.make_tensor_value_info("q", TensorProto.UINT8, [4])]
    graph = helper.make_graph(nodes, "u", info[:1], info[1:], initializers, value_info=kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_unsigned_activations_become_signed_of_the_same_range(tmp_path):
    import onnxruntime

    signed = ir.from_proto(unsigned_graph())
    assert qdq.sign_activations(signed) == 1
    model = ir.to_proto(signed)
    onnx.checker.check_model(model, full_check=True)
    feed = np.array([0, 1.0, 2.55, 9.0], np.float32)
    (values,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": feed})
    assert np.allclose(values, [0, 1.0, 2.55, 2.55], atol=0.5 * 2.55 / 127 + 1e-6)
    assert qdq.sign_activations(signed) == 0


def test_an_asymmetric_quantiser_is_not_turned_signed():
    with pytest.raises(PassError, match="asymmetric"):
        qdq.sign_activations(ir.from_proto(unsigned_graph(zero=7)))
