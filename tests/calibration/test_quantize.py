"""Quantises a small transformer-like graph for real, once, and looks at the result from all sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import pytest
from nncf.onnx.graph.model_transformer import ONNXModelTransformer
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

import passes
import targets
from calibration.nncf_weights import quantize_linear
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx, resolve_scopes
from calibration.ranges import graph_ranges
from mtu_compile.graph import io as graph_io
from tests.calibration.small_graph import (
    H,
    decibels,
    make_samples,
    run_openvino,
    run_ort,
    write_free_batch,
    write_graph,
)

pytestmark = pytest.mark.int8


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


def test_scopes_are_names_then_types_then_patterns(tmp_path):
    model = onnx.load(str(write_graph(tmp_path / "float.onnx")))
    assert resolve_scopes(model, ["ff.up", "Conv", r"attn\.[qk]"]) == (
        "ff.up",
        "conv_in",
        "conv_out",
        "attn.q",
        "attn.k",
    )


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
