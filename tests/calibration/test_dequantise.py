"""Layers given back to float, against NNCF leaving them alone and against the graph the choice was made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.dequantise import dequantise_onnx
from calibration.quant_settings import QuantSettings
from calibration.quantize import QuantisationReport, quantize_onnx
from calibration.switched_graph import SwitchedGraph
from mtu_compile.core.errors import PassError
from tests.calibration.test_sensitivity import feeds, run, write_graph

PLAIN = QuantSettings(smooth_quant_alpha=None)


def quantised(folder: Path, settings: QuantSettings = PLAIN) -> tuple[Path, Path, QuantisationReport]:
    source = write_graph(folder / "float.onnx")
    return source, folder / "int8.onnx", quantize_onnx(source, feeds(8), folder / "int8.onnx", settings=settings)


@pytest.mark.parametrize(
    "layers",
    [
        ("conv_in",),  # a convolution's bias is its own
        ("ff.up", "ff.down"),  # linear layers whose biases were corrected
        ("attn.q", "attn.k", "attn.v"),  # all that read one quantiser
        ("attn.k",),  # one of them
        ("attn.qk", "conv_out"),  # behind a Transpose and a Reshape of quantised numbers
    ],
)
def test_it_is_the_graph_nncf_makes_without_the_layers(tmp_path: Path, layers: tuple[str, ...]) -> None:
    source, int8, report = quantised(tmp_path)
    ignoring = tmp_path / "ignoring.onnx"
    expected = quantize_onnx(source, feeds(8), ignoring, settings=replace(PLAIN, ignored_scopes=layers))
    before = run(int8, feeds(1)[0])
    found = dequantise_onnx(int8, source, layers, report)
    for feed in feeds(3):
        assert np.array_equal(run(int8, feed), run(ignoring, feed))
    assert not np.array_equal(before, run(int8, feeds(1)[0]))
    assert replace(found, bytes_after=0) == replace(expected, bytes_after=0)
    assert found.bytes_after == int8.stat().st_size
    kinds = [sorted(node.op_type for node in onnx.load(path).graph.node) for path in (int8, ignoring)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_it_is_what_was_measured(tmp_path: Path, alpha: float | None) -> None:
    source, int8, report = quantised(tmp_path, replace(PLAIN, smooth_quant_alpha=alpha))
    feed = feeds(1)[0]
    with SwitchedGraph(source, int8) as graph:
        group = next(one for one in graph.groups if "attn.k" in one.members)
        rest = [one.name for one in graph.groups if one is not group]
        measured = graph.run(feed, rest)
    dequantise_onnx(int8, source, group.members, report)
    np.testing.assert_allclose(run(int8, feed), measured, atol=1e-6)


def test_a_float_layer_is_left_alone_and_a_layer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    source, int8, report = quantised(tmp_path, replace(PLAIN, ignored_scopes=("conv_in",)))
    before = run(int8, feeds(1)[0])
    dequantise_onnx(int8, source, ("conv_in",), report)
    assert np.array_equal(before, run(int8, feeds(1)[0]))
    kept = int8.read_bytes()
    with pytest.raises(PassError, match="no layer called 'nothing'"):
        dequantise_onnx(int8, source, ("conv_out", "nothing"), report)
    assert int8.read_bytes() == kept


def test_graphs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _, int8, report = quantised(tmp_path)
    other = onnx.load(tmp_path / "float.onnx")
    for node in other.graph.node:
        node.input[:] = [f"{name}/other" if name in ("p", "to_tokens") else name for name in node.input]
        node.output[:] = [f"{name}/other" if name == "p" else name for name in node.output]
    for tensor in other.graph.initializer:
        tensor.name = f"{tensor.name}/other" if tensor.name == "to_tokens" else tensor.name
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(PassError, match="has no value 'p/other'"):
        dequantise_onnx(int8, tmp_path / "other.onnx", ("conv_out",), report)


def test_nothing_left_to_quantise_is_an_error(tmp_path: Path) -> None:
    source, int8, report = quantised(tmp_path)
    everything = tuple(node.name for node in onnx.load(source).graph.node if node.op_type in ("Conv", "MatMul"))
    with pytest.raises(PassError, match="no weight was quantised"):
        dequantise_onnx(int8, source, everything, report)
