"""A UNet cut behind its deep part: the whole graph answers as before, and the shallow one as the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import passes
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.step_cache import DEEP
from passes import run_passes
from passes.base import PassContext
from passes.deep_feature import EmitDeepFeature, TakeDeepFeature

EMIT, TAKE = ("mtu::emit-deep-feature",), ("mtu::take-deep-feature",)
SIZES: dict[str, Any] = {"batch": 2, "height": 8, "width": 4, "text_length": 5}


def cut(source: Path, folder: Path, *before: str) -> tuple[Path, Path, Path]:
    """``source`` after the passes ``before``, as it is, whole and shallow."""
    lowered, whole, shallow = (folder / f"{name}.onnx" for name in ("lowered", "whole", "shallow"))
    if before:
        passes.run_pipeline(source, lowered, before, PassContext())
    else:
        lowered = source
    (emitted,) = passes.run_pipeline(lowered, whole, EMIT, PassContext())
    (taken,) = passes.run_pipeline(lowered, shallow, TAKE, PassContext())
    assert emitted.rewrites == 1 and taken.rewrites > 10
    return lowered, whole, shallow


def inputs(path: Path) -> list[str]:
    return [str(value.name) for value in graph_io.load(path).graph.inputs]


@pytest.fixture(scope="module")
def static(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text-to-image, static, two levels."""
    out = tmp_path_factory.mktemp("static") / "model.onnx"
    passes.specialise(exported("sd15"), out, task_id=0, channels=4, **SIZES)
    return out


@pytest.mark.parametrize("before", [(), ("mtu::to-fp16",), ("mtu::to-bf16",)])
def test_whole_and_shallow_answer_alike(
    before: tuple[str, ...], static: Path, tmp_path: Path, run_graph: Any, random_feeds: Any
) -> None:
    lowered, whole, shallow = cut(static, tmp_path, *before)
    feeds = random_feeds(static, 2, 4)
    assert inputs(shallow) == [*inputs(static), DEEP]
    assert len(graph_io.load(shallow).graph) < 0.5 * len(graph_io.load(lowered).graph)
    if before == ("mtu::to-bf16",):
        return  # ONNX Runtime computes nothing in bfloat16; the types were checked
    expected = run_graph(lowered, feeds)["out_sample"]
    answer = run_graph(whole, feeds)
    assert answer[DEEP].dtype == np.float32
    np.testing.assert_array_equal(answer["out_sample"], expected)
    again = run_graph(shallow, {**feeds, DEEP: answer[DEEP]})
    assert again.keys() == {"out_sample"}
    assert np.abs(again["out_sample"] - expected).max() <= 1e-5 * np.abs(expected).max()
    other = run_graph(shallow, {**feeds, DEEP: 2 * answer[DEEP]})["out_sample"]
    assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_graph_of_all_tasks_is_cut_with_any_batch(
    exported: Any, tmp_path: Path, run_graph: Any, random_feeds: Any
) -> None:
    shared = tmp_path / "shared.onnx"
    passes.run_pipeline(
        exported("micro"), shared, passes.SHARED_PIPELINE, PassContext(height=8, width=4, text_length=5)
    )
    _, whole, shallow = cut(shared, tmp_path)
    feeds = {**random_feeds(exported("micro"), 3, 9), "task": np.array([0, 3, 1])}
    answer = run_graph(whole, feeds)
    given = {name: feeds[name] for name in inputs(shallow) if name != DEEP}
    again = run_graph(shallow, {**given, DEEP: answer[DEEP]})["out_sample"]
    np.testing.assert_allclose(again, answer["out_sample"], atol=1e-5)
    frozen = tmp_path / "frozen.onnx"  # as targets want it whose shared engines have a batch of their own
    passes.run_pipeline(shallow, frozen, ("mtu::freeze-shapes",), PassContext(batch=1))
    one = {name: value[:1] for name, value in {**given, DEEP: answer[DEEP]}.items()}
    np.testing.assert_allclose(run_graph(frozen, one)["out_sample"], again[:1], atol=1e-5)


def test_cutting_again_changes_nothing(static: Path, tmp_path: Path) -> None:
    _, whole, shallow = cut(static, tmp_path)
    for path, ids in ((whole, EMIT), (shallow, TAKE)):
        (again,) = passes.run_pipeline(path, tmp_path / "again.onnx", ids, PassContext())
        assert not again.changed


def test_the_shallow_graph_of_a_whole_one_has_no_deep_output(static: Path, tmp_path: Path) -> None:
    _, whole, _ = cut(static, tmp_path)
    out = tmp_path / "out.onnx"
    passes.run_pipeline(whole, out, TAKE, PassContext())
    assert [value.name for value in graph_io.load(out).graph.outputs] == ["out_sample"]


def skipping(parse: Any, *, quantised: bool = False, second: bool = False) -> ir.Model:
    """Two convolutions, the second of a skip connection; the names are the exporter's."""
    through = "d = Sigmoid(a)"
    if quantised:
        through += " q = QuantizeLinear(d, scale, zero) e = DequantizeLinear(q, scale, zero)"
    into = "e" if quantised else "d"
    tail = "j = Concat<axis = 1>(b, a) y = Conv(j, wide)" if second else "y = Sigmoid(b)"
    graph: ir.Model = parse(
        f"""agraph (float[1, 4, 4, 4] sample, float[4] unused) => (float[1, 4, 4, 4] y) {{
            a = Conv(sample, first)
            {through}
            c = Concat<axis = 1>({into}, sample)
            b = Conv(c, wide)
            {tail}
        }}""",
        first=np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32),
        wide=np.random.default_rng(1).standard_normal((4, 8, 1, 1)).astype(np.float32),
        scale=np.array(0.01, np.float32),
        zero=np.array(0, np.int8),
    )
    ir.passes.common.ShapeInferencePass()(graph)
    names = iter(("up_blocks.0/Concat", "up_blocks.0/Concat_1"))
    for node in graph.graph:
        if node.op_type == "Concat":
            node.name = next(names)
    return graph


def test_a_quantised_deep_feature_is_given_as_it_was_before(parse: Any, run_graph: Any) -> None:
    feeds = {"sample": np.linspace(-2, 2, 64, dtype=np.float32).reshape(1, 4, 4, 4), "unused": np.ones(4, np.float32)}
    whole, shallow = skipping(parse, quantised=True), skipping(parse, quantised=True)
    run_passes(whole, [EmitDeepFeature()], PassContext())
    run_passes(shallow, [TakeDeepFeature()], PassContext())
    answer = run_graph(whole, feeds)
    assert len(np.unique(np.round(answer[DEEP] / 0.01, 3) % 1)) > 1  # not on the grid of the quantiser
    assert [node.op_type for node in shallow.graph] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "Concat",
        "Conv",
        "Sigmoid",
    ]
    assert [value.name for value in shallow.graph.inputs] == ["sample", DEEP]
    again = run_graph(shallow, {"sample": feeds["sample"], DEEP: answer[DEEP]})
    np.testing.assert_array_equal(again["y"], answer["y"])


def test_a_deep_layer_that_reaches_past_the_cut_is_refused(parse: Any) -> None:
    graph = skipping(parse, second=True)
    for node in graph.graph:  # the last concatenation's skip connection is the one before, which is deep
        if node.name == "up_blocks.0/Concat_1":
            node.replace_input_with(0, graph.graph.node("Sigmoid_1").outputs[0])
            before = next(one for one in graph.graph if one.name == "up_blocks.0/Concat")
            node.replace_input_with(1, before.outputs[0].uses()[0].node.outputs[0])
    with pytest.raises(PassError, match=r"still has the skip connections up_blocks\.0/Concat, up_blocks\.0/Concat_1"):
        run_passes(graph, [TakeDeepFeature()], PassContext())


def test_a_graph_without_skip_connections_is_refused(parse: Any) -> None:
    graph = parse("agraph (float[4] x) => (float[4] y) { y = Sigmoid(x) }")
    for item in (EmitDeepFeature(), TakeDeepFeature()):
        with pytest.raises(PassError, match="no skip connection into an up block"):
            run_passes(graph, [item], PassContext())


def test_a_deep_feature_that_is_an_input_is_refused(parse: Any) -> None:
    graph = parse(
        "agraph (float[1, 2, 2, 2] x, float[1, 2, 2, 2] z) => (float[1, 4, 2, 2] y) { y = Concat<axis = 1>(x, z) }"
    )
    next(iter(graph.graph)).name = "up_blocks.1/Concat"
    with pytest.raises(PassError, match="'x', the deep feature, is an input"):
        run_passes(graph, [EmitDeepFeature()], PassContext())
