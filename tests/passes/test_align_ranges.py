"""Factors for each task before a layer and out behind it: the same function, other ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import passes
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import constant_tensor, op_counts
from mtu_compile.graph.qdq import LAYERS

ID = "mtu::align-ranges"
BATCH, TEXT, HEIGHT, WIDTH, TASKS = 3, 5, 8, 4, 4
BATCHES = [(0, 1, 2), (3, 3, 0)]


@pytest.fixture(scope="module")
def shared(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``shared("micro", batch)`` is the float graph of all tasks; its batch is free if it is ``None``."""
    made: dict[tuple[str, Any], Path] = {}

    def get(name: str, batch: Any = BATCH) -> Path:
        if (name, batch) not in made:
            made[name, batch] = tmp_path_factory.mktemp("shared") / "model.onnx"
            context = passes.PassContext(batch=batch, height=HEIGHT, width=WIDTH, text_length=TEXT)
            passes.run_pipeline(exported(name), made[name, batch], passes.SHARED_PIPELINE, context)
        return made[name, batch]

    return get


def layers(graph: ir.Model) -> list[ir.Node]:
    """Those that can be aligned."""
    return [node for node in graph.graph if node.op_type in LAYERS and constant_tensor(node.inputs[1]) is not None]


def random_alignment(graph: ir.Model, *, only: str = "") -> passes.Alignment:
    """Powers of two from 1/8 to 8; layers that read one value have the same."""
    random, factors, of_input = np.random.default_rng(7), {}, {}
    for node in layers(graph):
        if (
            only in str(node.name) and node.inputs[0].shape[0] != 1
        ):  # the timestep's layers are the same for all samples
            drawn = tuple(2.0 ** random.integers(-3, 4, TASKS))
            factors[str(node.name)] = of_input.setdefault(node.inputs[0], drawn)
    return passes.Alignment(factors)


def align(graph: ir.Model, alignment: passes.Alignment) -> passes.PassResult:
    context = passes.PassContext(alignment=alignment)
    (result,) = passes.run_passes(graph, passes.builtin().pipeline([ID]), context)
    return result


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("micro", BATCH),
        pytest.param("sd15", None, marks=pytest.mark.heavy),
        pytest.param("sdxl", BATCH, marks=pytest.mark.heavy),
    ],
)
def test_every_layer_aligned_and_no_result_differs(
    name: str, batch: Any, exported: Any, shared: Any, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    graph = graph_io.load(shared(name, batch))
    alignment = random_alignment(graph)
    result = align(graph, alignment)
    assert result.rewrites == len(alignment.factors) and not result.skipped
    feeds = random_feeds(exported(name), BATCH, 9)
    for tasks in BATCHES:
        feeds["task"] = np.array(tasks)
        assert_close(run_graph(graph, feeds), run_graph(shared(name, batch), feeds))


def test_what_is_multiplied_anyway_takes_the_factor(shared: Any) -> None:
    """Norms and gates of the tasks, and the constants that scale queries and keys, cost no node."""
    before, graph = graph_io.load(shared("micro")), graph_io.load(shared("micro"))
    alignment = random_alignment(graph, only=".ff.net.")
    align(graph, alignment)
    assert len(alignment.factors) >= 4  # up and down of two blocks or more
    more = op_counts(graph) - op_counts(before)
    assert more["Mul"] == len(alignment.factors)  # behind each, and none in front
    assert set(more) <= {"Mul", "Gather"}


def test_behind_cross_attention_the_values_are_multiplied_for_they_are_fewer(shared: Any) -> None:
    graph = graph_io.load(shared("micro"))
    align(graph, random_alignment(graph, only="attn2.to_out"))
    products = [node for node in graph.graph if str(node.name).endswith("attn2.to_out.0.aligned/Mul")]
    assert products and all(node.outputs[0].shape[1] == TEXT for node in products)  # type: ignore[index]
    assert all(".to_v/" in str(node.inputs[0].producer().name) for node in products)  # type: ignore[union-attr]


def test_layers_that_read_one_value_share_one_product(shared: Any) -> None:
    graph = graph_io.load(shared("micro"))
    align(graph, random_alignment(graph, only="attn1.to_"))
    by_name = {str(node.name): node for node in graph.graph}
    names = [name.removesuffix("to_q/MatMul") for name in by_name if name.endswith("attn1.to_q/MatMul")]
    assert names
    for name in names:
        assert len({by_name[f"{name}{part}/MatMul"].inputs[0] for part in ("to_q", "to_k", "to_v")}) == 1


def test_it_does_nothing_a_second_time(shared: Any, tmp_path: Path) -> None:
    graph = graph_io.load(shared("micro"))
    alignment = random_alignment(graph)
    align(graph, alignment)
    graph_io.save(graph, tmp_path / "aligned.onnx")
    again = graph_io.load(tmp_path / "aligned.onnx")  # a file remembers
    names = [node.name for node in again.graph]
    result = align(again, alignment)
    assert not result.changed and {one.reason for one in result.skipped} == {"it is aligned already"}
    assert [node.name for node in again.graph] == names


def test_what_it_leaves_alone_it_says(shared: Any) -> None:
    graph = graph_io.load(shared("micro"))
    product = next(str(node.name) for node in graph.graph if str(node.name).endswith("attn1/MatMul"))
    layer = next(name for name in random_alignment(graph).factors if "resnets" in name)
    result = align(graph, passes.Alignment({product: (1.0, 2.0, 1.0, 1.0), layer: (1.0,) * TASKS}))
    assert not result.changed
    assert [(one.node, one.reason) for one in result.skipped] == [
        (product, "it multiplies two activations"),
        (layer, "its factors are all 1"),
    ]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"nothing": (1.0, 2.0, 1.0, 1.0)}, "no layer 'nothing'"),
        ({"": (1.0, 2.0)}, "has 2 factors, not 4"),
        ({"": (1.0, 0.0, 1.0, 1.0)}, "is not positive"),
        ({"": (1.0, float("nan"), 1.0, 1.0)}, "is not positive"),
    ],
)
def test_bad_factors_are_refused(factors: dict[str, tuple[float, ...]], message: str, shared: Any) -> None:
    graph = graph_io.load(shared("micro"))
    some = str(layers(graph)[-1].name)
    with pytest.raises(PassError, match=message):
        align(graph, passes.Alignment({name or some: numbers for name, numbers in factors.items()}))


def test_a_graph_before_its_tasks_are_rows_is_refused(exported: Any) -> None:
    graph = graph_io.load(exported("micro"))
    with pytest.raises(PassError, match="no input 'task'"):
        align(graph, passes.Alignment({str(layers(graph)[-1].name): (2.0,)}))


def test_a_row_that_is_another_tasks_is_seen(
    exported: Any, shared: Any, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    """The comparison above fails on a seeded defect: one layer's output divided by another task's factor."""
    graph = graph_io.load(shared("micro"))
    align(graph, random_alignment(graph))
    name, table = next((name, v) for name, v in graph.graph.initializers.items() if name.endswith(".restored"))
    assert table.const_value is not None
    table.const_value = ir.tensor(np.roll(table.const_value.numpy(), 1, axis=0), name=name)
    feeds = random_feeds(exported("micro"), BATCH, 9) | {"task": np.array([0, 1, 2])}
    with pytest.raises(AssertionError, match="differs"):
        assert_close(run_graph(graph, feeds), run_graph(shared("micro"), feeds))


def test_what_a_quantiser_leaves_in_float_it_still_leaves(
    exported: Any, shared: Any, random_feeds: Any, tmp_path: Path
) -> None:
    """NNCF knows an attention by its nodes: one product more among them, and its values would become INT8."""
    graph = graph_io.load(shared("micro"))
    align(graph, random_alignment(graph, only="attn"))
    graph_io.save(graph, tmp_path / "aligned.onnx")
    feeds = random_feeds(exported("micro"), BATCH, 9) | {"task": np.array([0, 1, 2])}
    settings = QuantSettings(smooth_quant_alpha=None, range_estimator="minmax")
    report = quantize_onnx(tmp_path / "aligned.onnx", [feeds], tmp_path / "int8.onnx", settings=settings)
    values = {str(node.name) for node in graph.graph if str(node.name).endswith(("attn1/MatMul_1", "attn2/MatMul_1"))}
    assert values and values == {name for name in report.float_layers if "attn" in name}
