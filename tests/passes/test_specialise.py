"""The whole pipeline on exported models: every anatomy, number of experts, kind of norm, and top-k."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import passes
from mtu_compile.core.errors import PassError
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import op_counts
from passes import folding

LATENT, TEXT, HEIGHT, WIDTH = 4, 5, 8, 4
HEAVY = [pytest.param(name, marks=pytest.mark.heavy) for name in ("sd15", "sdxl")]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("full-sd2", "full-sdxl")]
ANATOMIES = ["sd2", *HEAVY, *SLOW]
MODELS = ["micro", *ANATOMIES]


def specialise(source: Path, out: Path, task_id: int, /, **options: Any) -> tuple[passes.PassResult, ...]:
    task = PAPER_TASKS[task_id]
    sizes = {"batch": task.unet_batch, "height": HEIGHT, "width": WIDTH, "text_length": TEXT}
    channels = LATENT + task.condition_channels(LATENT)
    return passes.specialise(source, out, **{"task_id": task_id, "channels": channels} | sizes | options)


def of_all_tasks(feeds: dict[str, Any], task_id: int, channels: int = 9) -> dict[str, Any]:
    """Inputs of one task's graph as inputs of the dynamic graph; what the task does not read is filled with junk."""
    batch, used, height, width = feeds["sample"].shape
    sample = np.full((batch, channels, height, width), 7.0, dtype=np.float32)
    sample[:, :used] = feeds["sample"]
    return {**feeds, "sample": sample, "task_ids": np.full(batch, task_id)}


def assert_same_work(graph: Path, plain: Path) -> None:
    """The graph has the plain UNet's nodes: no routing is left, and no computation was added."""
    counts, wanted = op_counts(graph_io.load(graph)), op_counts(graph_io.load(plain))
    for op_type in ("Conv", "MatMul", "Gemm"):
        assert counts[op_type] == wanted[op_type], op_type
    assert counts == wanted


@pytest.fixture(scope="session")
def static_plain(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("plain") / "model.onnx"
            context = passes.PassContext(batch=2, height=HEIGHT, width=WIDTH, text_length=TEXT)
            passes.run_pipeline(exported(f"plain-{name}"), made[name], passes.STATIC_PIPELINE, context)
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task_id", range(len(PAPER_TASKS)))
def test_a_task_graph_computes_what_the_dynamic_graph_does(
    name: str, task_id: int, exported: Any, tmp_path: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    out = tmp_path / "model.onnx"
    specialise(exported(name), out, task_id)
    task = PAPER_TASKS[task_id]
    feeds = random_feeds(out, task.unet_batch, LATENT + task.condition_channels(LATENT))
    assert_close(run_graph(out, feeds), run_graph(exported(name), of_all_tasks(feeds, task_id)))


@pytest.mark.parametrize("name", ANATOMIES)
def test_a_task_graph_has_the_plain_unets_nodes(name: str, exported: Any, static_plain: Any, tmp_path: Path) -> None:
    specialise(exported(name), tmp_path / "model.onnx", 1)
    assert_same_work(tmp_path / "model.onnx", static_plain(name))


def test_node_comparison_fails_on_a_graph_with_routing(exported: Any, static_plain: Any, tmp_path: Path) -> None:
    context = passes.PassContext(batch=2, height=HEIGHT, width=WIDTH, text_length=TEXT)
    passes.run_pipeline(exported("sd15"), tmp_path / "model.onnx", passes.STATIC_PIPELINE, context)
    with pytest.raises(AssertionError, match="MatMul"):
        assert_same_work(tmp_path / "model.onnx", static_plain("sd15"))


@pytest.mark.parametrize("name", MODELS)
def test_the_dynamic_graph_is_the_torch_model_for_mixed_tasks_and_other_sizes(
    name: str, exported: Any, mtu_model: Any, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    import torch

    feeds = random_feeds(exported(name), 3, 9, 4, 12) | {"task_ids": np.array([3, 0, 2])}
    inputs = {key: torch.from_numpy(value) for key, value in feeds.items()}
    added = {key: inputs.pop(key) for key in ("text_embeds", "time_ids") if key in inputs}
    with torch.no_grad():
        expected = mtu_model(name)(**inputs, added_cond_kwargs=added or None, return_dict=False)[0].numpy()
    assert_close(run_graph(exported(name), feeds), {"out_sample": expected})


def test_comparison_fails_on_a_wrong_weight_a_missing_output_and_a_shape(
    micro: Path, tmp_path: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    out = tmp_path / "model.onnx"
    specialise(micro, out, 0)
    feeds = random_feeds(out, 2, 4)
    expected = run_graph(out, feeds)
    graph = graph_io.load(out)
    name = next(n for n in graph.graph.initializers if n.endswith("ff.net.2.bias"))
    bias = graph.graph.initializers[name]
    bias.const_value = graph_io.ir.tensor(bias.const_value.numpy() + np.float32(1e-3), name=name)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(run_graph(graph, feeds), expected)
    with pytest.raises(AssertionError):
        assert_close({}, expected)
    with pytest.raises(AssertionError, match="out_sample"):
        assert_close({"out_sample": expected["out_sample"][:1]}, expected)
    with pytest.raises(AssertionError, match="differs"):
        assert_close({"out_sample": np.full_like(expected["out_sample"], np.nan)}, expected)


def test_inputs_are_the_tasks_own_and_static(micro: Path, tmp_path: Path) -> None:
    specialise(micro, tmp_path / "model.onnx", 3)
    graph = graph_io.load(tmp_path / "model.onnx").graph
    assert {v.name: list(v.shape.numpy()) for v in graph.inputs} == {
        "sample": [3, 9, HEIGHT, WIDTH],
        "timestep": [1],
        "encoder_hidden_states": [3, TEXT, 32],
    }
    assert [(v.name, list(v.shape.numpy())) for v in graph.outputs] == [("out_sample", [3, 4, HEIGHT, WIDTH])]


def test_what_each_pass_did_is_reported(micro: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    results = specialise(micro, tmp_path / "model.onnx", 0, on_pass=lambda result: seen.append(result.id))
    assert tuple(seen) == tuple(result.id for result in results) == passes.TASK_PIPELINE
    rewrites = Counter({result.id: result.rewrites for result in results})
    assert rewrites["mtu::drop-experts"] == rewrites["mtu::merge-experts"] == 3  # one block down, two up; top-k of 1
    assert all(result.changed for result in results)


def test_a_second_run_changes_nothing(micro: Path, tmp_path: Path) -> None:
    specialise(micro, tmp_path / "once.onnx", 1)
    results = specialise(tmp_path / "once.onnx", tmp_path / "twice.onnx", 1)
    assert not any(result.changed for result in results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_id": 9}, "does the model have a task|reads 0 channels"),
        ({"task_id": -1}, "negative"),
        ({"channels": 8}, "reads 4 channels of 'sample', not 8"),
        ({"batch": 0}, "size 0"),
        ({"text_length": 6}, "it is 5"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    options: dict[str, Any], message: str, micro: Path, tmp_path: Path
) -> None:
    with pytest.raises(PassError) as caught:
        specialise(micro, tmp_path / "out" / "model.onnx", 0, **options)
    assert any(part in f"{caught.value.message} {caught.value.hint}" for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_a_size_the_unet_cannot_take_is_refused(exported: Any, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"static shape|invalid graph|dimension"):
        specialise(exported("sd15"), tmp_path / "model.onnx", 0, height=7)
    assert not (tmp_path / "model.onnx").exists()


def test_the_task_may_stay_an_input_of_a_static_graph(
    micro: Path, tmp_path: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    out = tmp_path / "all.onnx"
    context = passes.PassContext(batch=3, height=HEIGHT, width=WIDTH, text_length=TEXT)
    passes.run_pipeline(micro, out, passes.STATIC_PIPELINE, context)
    feeds = random_feeds(micro, 3, 9) | {"task_ids": np.array([1, 3, 0])}
    assert_close(run_graph(out, feeds), run_graph(micro, feeds))


def test_specialising_reads_only_the_weights_it_rewrites(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_feeds: Any, run_graph: Any
) -> None:
    external = graph_io.save(graph_io.load(micro), tmp_path / "external" / "model.onnx", external_bytes=0)
    read: set[str] = set()
    for method in ("numpy", "tobytes"):
        original = getattr(ir.ExternalTensor, method)

        def spy(tensor: ir.ExternalTensor, original: Any = original) -> Any:
            read.add(tensor.name)
            return original(tensor)

        monkeypatch.setattr(ir.ExternalTensor, method, spy)
    options = {"task_id": 1, "channels": 8, "batch": 3, "height": HEIGHT, "width": WIDTH, "text_length": TEXT}
    out = tmp_path / "lazy" / "model.onnx"
    passes.specialise(external, out, **options, external_bytes=0)
    source = onnx.load(str(external), load_external_data=False)
    sizes = {t.name: int(np.prod(t.dims)) * 4 for t in source.graph.initializer if t.external_data}
    weights = {name for name, size in sizes.items() if size > 4 * folding.SMALL}
    kept = weights & {t.name for t in onnx.load(str(out), load_external_data=False).graph.initializer}
    assert len(kept) >= 6 and not kept & read
    assert (out.parent / "model.onnx.data").exists()
    whole = tmp_path / "whole.onnx"
    passes.specialise(micro, whole, **options)
    feeds = random_feeds(whole, 3, 8)
    np.testing.assert_array_equal(*(run_graph(path, feeds)["out_sample"] for path in (out, whole)))
